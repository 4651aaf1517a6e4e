"""`blt-patch calibrate`: find a threshold for a target mean patch length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import format_bytes, friendly_errors, print_table
from blt_data.errors import InputError
from blt_patcher.calibrate import Calibration, Sample, calibrate, take_sample
from blt_patcher.commands.model_options import ModelOptions, model_options
from blt_patcher.commands.options import entropy_scheme_option, sample_option, scheme_options
from blt_patcher.commands.scoring import as_entropy_based, score_sample, warn_of_miss
from blt_patcher.scheme_file import scheme_file_to_json, write_scheme_file
from blt_patcher.scheme_options import SchemeOptions, SchemeRequest, resolve_scheme
from blt_patcher.schemes import describe_scheme

if TYPE_CHECKING:
    from blt_patcher.entropies import EntropyScorer

#: Points of the curve in a figure, besides those of the table.
_OUTLINE_POINTS = 80


@click.command(
    "calibrate",
    epilog="Example: blt-patch calibrate data/bytes --entropy-model runs/entropy/latest --target-patch-length 4.5 "
    "--output threshold.json, then blt-patch precompute data/bytes --scheme-file threshold.json … "
    "Without a model, from stored entropies: blt-patch calibrate data/patched --target-patch-length 6",
)
@click.argument("shards", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--target-patch-length", required=True, type=float, metavar="L", help="Wanted tokens per patch.")
@click.option(
    "--entropy-model",
    type=click.Path(path_type=Path),
    metavar="M",
    help="A model or run directory  [not needed where DIR stores entropies].",
)
@entropy_scheme_option
@scheme_options
@sample_option
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write a scheme file for precompute and repatch."
)
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the curve as a page.")
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Write the curve as a picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the scheme file instead of tables.")
@friendly_errors
@model_options
def calibrate_command(
    shards: Path,
    target_patch_length: float,
    entropy_model: Path | None,
    scheme: str,
    threshold: float | None,
    relative_threshold: float | None,
    max_patch_length: int | None,
    sample_bytes: int,
    running: ModelOptions,
    output: Path | None,
    html: Path | None,
    png: Path | None,
    as_json: bool,
) -> None:
    """Find the threshold that gives a wanted mean patch length on the shards in DIR.

    DIR holds byte shards, scored with --entropy-model, or patched shards with stored entropies, for which no model is
    needed. The result is exact on the sample: no other float16 threshold comes nearer. For entropy-combined give one
    of --threshold and --relative-threshold; the other is found.
    """
    options = SchemeOptions(
        scheme=scheme,
        threshold=threshold,
        relative_threshold=relative_threshold,
        max_patch_length=max_patch_length,
        target_patch_length=target_patch_length,
    )
    request = resolve_scheme(options)
    directory = ShardDirectory.open(shards)
    spec = running.spec(entropy_model)
    scorer = None if spec is None else spec.load()
    found, sample, content = _find(
        directory, request, target_patch_length, sample_bytes, scorer, html is not None or png is not None
    )
    _write_figures(found, sample, html, png)
    if output is not None:
        write_scheme_file(output, content)
    if as_json:
        click.echo(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        _print_tables(found, sample, output)
    warn_of_miss(found)


def _find(
    directory: ShardDirectory,
    request: SchemeRequest,
    target: float,
    sample_bytes: int,
    scorer: EntropyScorer | None,
    outline: bool,
) -> tuple[Calibration, Sample, dict[str, Any]]:
    """Return the calibration, the sample it was made on, and what the scheme file says."""
    scheme, free = as_entropy_based(request.scheme), str(request.free)
    identity, settings = _stored(directory) if scorer is None else (scorer.identity, scorer.settings)
    sample = take_sample(directory, sample_bytes)
    nats = sample.entropies if scorer is None else score_sample(sample, scorer)
    if nats is None:
        raise InputError(f"{directory.path}: its shards keep no entropies; name an entropy model")
    content, offsets = sample.content, sample.content_offsets
    points = _OUTLINE_POINTS if outline else 0
    found = calibrate(scheme, free, target, content, offsets, nats, outline_points=points)
    file = scheme_file_to_json(
        found.scheme,
        calibration={**found.to_json(), "sample": sample.statement},
        entropy_model=identity,
        entropy_settings=settings,
        curve=[{"threshold": p.threshold, "mean_patch_length": p.mean_patch_length} for p in found.curve],
    )
    return found, sample, file


def _stored(directory: ShardDirectory) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the model and settings behind a directory's stored entropies.

    Raises:
        InputError: it stores none.
    """
    if directory.kind is ShardKind.BYTES:
        raise InputError(f"{directory.path}: holds byte shards, which have no entropies; name an entropy model")
    if not all(entry.entropies for entry in directory.manifest.shards):
        raise InputError(
            f"{directory.path}: its shards keep no entropies; name an entropy model, or patch again and keep them"
        )
    model = directory.manifest.provenance.get("entropy_model")
    settings = directory.manifest.provenance.get("entropy_settings")
    return model if isinstance(model, dict) else None, settings if isinstance(settings, dict) else None


def _print_tables(found: Calibration, sample: Sample, output: Path | None) -> None:
    flag = found.parameter.replace("_", "-")
    rows = [
        (repr(point.threshold), f"{point.mean_patch_length:.4f}", "◀" if point.threshold == found.threshold else "")
        for point in found.curve
    ]
    print_table(f"{flag} and mean patch length", rows, header=(flag, "tokens per patch", ""))
    print_table("calibration", _figures(found, sample, output))


def _figures(found: Calibration, sample: Sample, output: Path | None = None) -> dict[str, object]:
    rows: dict[str, object] = {
        found.parameter.replace("_", " "): repr(found.threshold),
        "mean patch length": f"{found.mean_patch_length:.4f}",
        "target": f"{found.target_patch_length:g}",
        "sample documents": sample.statement["documents"],
        "sample bytes": format_bytes(sample.content.size),
        "scheme": describe_scheme(found.scheme),
    }
    return rows if output is None else {**rows, "scheme file": str(output)}


def _write_figures(found: Calibration, sample: Sample, html: Path | None, png: Path | None) -> None:
    """Write the curve to the files asked for."""
    if html is None and png is None:
        return
    from blt_patcher.figures import Section, draw_curve, html_page, write_page, write_png

    drawing = draw_curve(found)
    if png is not None:
        write_png(png, drawing)
    if html is None:
        return
    rows = [(repr(point.threshold), f"{point.mean_patch_length:.4f}") for point in found.curve]
    chosen = [point.threshold for point in found.curve].index(found.threshold)
    name = found.parameter.replace("_", " ")
    table = Section(heading="Some thresholds", header=(name, "tokens per patch"), rows=rows, chosen_row=chosen)
    page = html_page(
        "Calibration",
        "The mean patch length that each threshold gives on the sample. The one found is the float16 number that comes "
        "nearest to the target.",
        _figures(found, sample),
        [Section(drawings=[drawing]), table],
    )
    write_page(html, page)
