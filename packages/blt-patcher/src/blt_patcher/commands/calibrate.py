"""`blt-patch calibrate`: find a threshold for a target mean patch length."""

from __future__ import annotations

import json
from pathlib import Path

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import format_bytes, friendly_errors, print_table
from blt_patcher.calibrate import Calibration, Sample, take_sample
from blt_patcher.commands.options import sample_option, scheme_options, scoring_options
from blt_patcher.commands.scoring import make_scorer, score_and_calibrate, warn_of_miss
from blt_patcher.scheme_options import SchemeOptions, resolve_scheme
from blt_patcher.schemes import SCHEMES, EntropyScheme, describe_scheme


@click.command(
    "calibrate",
    epilog="Example: blt-patch calibrate data/bytes --entropy-model runs/entropy/latest --target-patch-length 4.5",
)
@click.argument("byte_shards", metavar="BYTES", type=click.Path(path_type=Path))
@click.option(
    "--entropy-model", required=True, type=click.Path(path_type=Path), metavar="M", help="A model or run directory."
)
@click.option("--target-patch-length", required=True, type=float, metavar="L", help="Wanted tokens per patch.")
@click.option(
    "--scheme",
    type=click.Choice([name for name, cls in SCHEMES.items() if cls.needs_entropies]),
    default=EntropyScheme.name,
    show_default=True,
    help="The scheme whose threshold to find.",
)
@scheme_options
@sample_option
@scoring_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@friendly_errors
def calibrate_command(
    byte_shards: Path,
    entropy_model: Path,
    target_patch_length: float,
    scheme: str,
    threshold: float | None,
    relative_threshold: float | None,
    max_patch_length: int | None,
    sample_bytes: int,
    window_tokens: int | None,
    device: str | None,
    compile_model: bool,
    as_json: bool,
) -> None:
    """Find the threshold that gives a wanted mean patch length on the byte shards in BYTES.

    The result is exact on the sample: no other float16 threshold comes nearer. For entropy-combined give one of
    --threshold and --relative-threshold; the other is found.
    """
    request = resolve_scheme(
        SchemeOptions(
            scheme=scheme,
            threshold=threshold,
            relative_threshold=relative_threshold,
            max_patch_length=max_patch_length,
            target_patch_length=target_patch_length,
        )
    )
    source = ShardDirectory.open(byte_shards, kind=ShardKind.BYTES)
    sample = take_sample(source, sample_bytes)
    scorer = make_scorer(entropy_model, window_tokens, device, compile_model)
    found = score_and_calibrate(request.scheme, str(request.free), target_patch_length, sample, scorer)
    if as_json:
        curve = [{"threshold": p.threshold, "mean_patch_length": p.mean_patch_length} for p in found.curve]
        click.echo(json.dumps({**found.to_json(), "sample": sample.statement, "curve": curve}, indent=1))
        return
    flag = found.parameter.replace("_", "-")
    rows = [
        (repr(point.threshold), f"{point.mean_patch_length:.4f}", "◀" if point.threshold == found.threshold else "")
        for point in found.curve
    ]
    print_table(f"{flag} and mean patch length", rows, header=(flag, "tokens per patch", ""))
    print_table("calibration", _calibration_rows(found, sample))
    warn_of_miss(found)


def _calibration_rows(found: Calibration, sample: Sample) -> dict[str, object]:
    return {
        found.parameter.replace("_", " "): repr(found.threshold),
        "mean patch length": f"{found.mean_patch_length:.4f}",
        "target": f"{found.target_patch_length:g}",
        "sample documents": sample.statement["documents"],
        "sample bytes": format_bytes(sample.content.size),
        "scheme": describe_scheme(found.scheme),
    }
