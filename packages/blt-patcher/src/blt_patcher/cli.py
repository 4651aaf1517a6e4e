"""The `blt-patch` command: calibrate a threshold, precompute patches, look at patch lengths."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import ByteSize, format_bytes, friendly_errors, print_table, progress
from blt_data.errors import InputError
from blt_data.openmp import spin_less
from blt_patcher.calibrate import DEFAULT_SAMPLE_BYTES, Calibration, EntropyBasedScheme, Sample, calibrate, take_sample
from blt_patcher.precompute import PrecomputeResult, check_arguments, precompute
from blt_patcher.scheme_options import SchemeOptions, resolve_scheme
from blt_patcher.schemes import (
    SCHEMES,
    EntropyScheme,
    PatchScheme,
    describe_scheme,
)
from blt_patcher.stats import QUANTILES, collect_stats, draw_histogram, provenance_rows

if TYPE_CHECKING:
    from blt_patcher.entropies import EntropyScorer

log = logging.getLogger(__name__)

Command = TypeVar("Command", bound=Callable[..., Any])

#: Drift from the target, as a share of it, that is worth a warning.
_DRIFT = 0.05


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="blt-patcher")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done.")
def main(verbose: bool) -> None:
    """Cut documents into patches for byte-level language models."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


def _options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_scheme_options = _options(
    click.option("--threshold", type=float, metavar="T", help="θ in nats, of schemes entropy and entropy-combined."),
    click.option(
        "--relative-threshold",
        type=float,
        metavar="R",
        help="θ_r in nats, of schemes entropy-monotonic and entropy-combined.",
    ),
    click.option("--max-patch-length", type=int, metavar="M", help="Longest patch in tokens; longer ones are split."),
)
_scoring_options = _options(
    click.option("--window-tokens", type=int, metavar="N", help="Tokens the entropy model sees at once."),
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N  [the GPU if there is one]."),
    click.option("--compile", "compile_model", is_flag=True, help="Compile the entropy model; pays off on a GPU."),
)
_sample_option = click.option(
    "--sample-bytes",
    type=ByteSize(),
    default=DEFAULT_SAMPLE_BYTES,
    show_default=True,
    metavar="SIZE",
    help="Bytes to calibrate on: evenly spaced documents.",
)


@main.command(
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
@_scheme_options
@_sample_option
@_scoring_options
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
    scorer = _make_scorer(entropy_model, window_tokens, device, compile_model)
    found = _calibrate(request.scheme, str(request.free), target_patch_length, sample, scorer)
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
    _warn_of_drift(found)


@main.command(
    "precompute",
    epilog="Example: blt-patch precompute data/bytes --output data/patched --entropy-model runs/entropy/latest "
    "--target-patch-length 4.5. Without a model: blt-patch precompute data/bytes --output data/space --scheme space",
)
@click.argument("byte_shards", metavar="BYTES", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Directory to write.")
@click.option("--entropy-model", type=click.Path(path_type=Path), metavar="M", help="Model or run.")
@click.option("--scheme", type=click.Choice(list(SCHEMES)), help="How to patch  [entropy, if it has a threshold].")
@click.option("--target-patch-length", type=float, metavar="L", help="Find the threshold for L tokens per patch first.")
@click.option("--patch-length", type=int, metavar="K", help="Tokens per patch of scheme static.")
@_scheme_options
@_sample_option
@click.option("--keep-entropies", is_flag=True, help="Store the entropies beside the patch lengths.")
@_scoring_options
@friendly_errors
def precompute_command(
    byte_shards: Path,
    output: Path,
    entropy_model: Path | None,
    scheme: str | None,
    target_patch_length: float | None,
    patch_length: int | None,
    threshold: float | None,
    relative_threshold: float | None,
    max_patch_length: int | None,
    sample_bytes: int,
    keep_entropies: bool,
    window_tokens: int | None,
    device: str | None,
    compile_model: bool,
) -> None:
    """Write patched shards of the byte shards in BYTES.

    Interrupted, run the same command again: finished shards are kept, and the result is the same to the byte.
    """
    request = resolve_scheme(
        SchemeOptions(
            scheme=scheme,
            threshold=threshold,
            relative_threshold=relative_threshold,
            patch_length=patch_length,
            max_patch_length=max_patch_length,
            target_patch_length=target_patch_length,
        )
    )
    check_arguments(request.scheme, entropy_model is not None, keep_entropies)
    source = ShardDirectory.open(byte_shards, kind=ShardKind.BYTES)
    scorer = None
    if entropy_model is not None:
        scorer = _make_scorer(entropy_model, window_tokens, device, compile_model)
    elif window_tokens is not None or device is not None or compile_model:
        raise InputError("--window-tokens, --device and --compile are for an entropy model; leave them out")
    patch_scheme: PatchScheme = request.scheme
    record: dict[str, Any] | None = None
    if request.free is not None and target_patch_length is not None and scorer is not None:
        sample = take_sample(source, sample_bytes)
        found = _calibrate(request.scheme, request.free, target_patch_length, sample, scorer)
        _warn_of_drift(found)
        patch_scheme = found.scheme
        record = {**found.to_json(), "sample": sample.statement}
    started = time.monotonic()
    tokens = source.manifest.bytes + 2 * source.manifest.documents
    with progress("patching", tokens, "B") as bar:
        result = precompute(
            source,
            output,
            scheme=patch_scheme,
            scorer=scorer,
            keep_entropies=keep_entropies,
            calibration=record,
            advance=bar.advance,
        )
    _print_result(output, patch_scheme, result, time.monotonic() - started)


@main.command("stats", epilog="Example: blt-patch stats data/patched")
@click.argument("patched_shards", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table and a histogram.")
@friendly_errors
def stats_command(patched_shards: Path, as_json: bool) -> None:
    """Tell how long the patches in DIR are: mean, quantiles, histogram. Lengths are in framed tokens."""
    directory = ShardDirectory.open(patched_shards, kind=ShardKind.PATCHED)
    with progress("counting", len(directory), "shards") as bar:
        stats = collect_stats(directory, advance=bar.advance)
    if as_json:
        click.echo(json.dumps(stats.to_json(), indent=1))
        return
    rows: dict[str, object] = {
        "documents": stats.documents,
        "bytes": stats.bytes,
        "patches": stats.patches,
        "mean patch length": f"{stats.mean:.4f}",
        **{f"{100 * share:g}% are at most": stats.quantile(share) for share in QUANTILES},
        "longest": stats.quantile(1.0),
        **provenance_rows(directory.manifest),
    }
    print_table(f"patch lengths of {patched_shards}", rows)
    click.echo("\nlength    share of patches")
    click.echo(draw_histogram(stats))


def _make_scorer(path: Path, window_tokens: int | None, device: str | None, compile_model: bool) -> EntropyScorer:
    """Load the entropy model; torch is imported here, once there is something to do with it."""
    if not path.is_dir():
        raise InputError(f"{path}: no such model directory; name one that blt-train wrote, such as RUN/latest")
    spin_less()
    try:
        from blt_patcher.entropies import EntropyScorer, choose_device, load_entropy_model
    except ModuleNotFoundError as error:
        raise InputError(f"entropies need {error.name}; pip install 'blt-patcher[entropy]'") from error
    where = choose_device(device)
    return EntropyScorer(
        load_entropy_model(path, device=where),
        device=where,
        window_tokens=window_tokens,
        compile=compile_model,
    )


def _calibrate(scheme: PatchScheme, free: str, target: float, sample: Sample, scorer: EntropyScorer) -> Calibration:
    """Score the sample and find the threshold, showing progress."""
    if not isinstance(scheme, EntropyBasedScheme):
        raise InputError(f"scheme {scheme.name} has no threshold to find; leave --target-patch-length out")
    tokens = sample.content.size + 2 * (sample.content_offsets.size - 1)
    with progress("scoring the sample", tokens, "B") as bar:
        nats = scorer.score(sample.content, sample.content_offsets, name="the sample", advance=bar.advance)
    return calibrate(scheme, free, target, sample.content, sample.content_offsets, nats)


def _calibration_rows(found: Calibration, sample: Sample) -> dict[str, object]:
    return {
        found.parameter.replace("_", " "): repr(found.threshold),
        "mean patch length": f"{found.mean_patch_length:.4f}",
        "target": f"{found.target_patch_length:g}",
        "sample documents": sample.statement["documents"],
        "sample bytes": format_bytes(sample.content.size),
        "scheme": describe_scheme(found.scheme),
    }


def _warn_of_drift(found: Calibration) -> None:
    drift = found.mean_patch_length / found.target_patch_length - 1
    if abs(drift) > _DRIFT:
        click.echo(
            f"warning: the nearest mean patch length is {found.mean_patch_length:.4g}, {100 * drift:+.0f}% from the "
            f"target of {found.target_patch_length:g}; a larger sample may come nearer",
            err=True,
        )


def _print_result(output: Path, scheme: PatchScheme, result: PrecomputeResult, seconds: float) -> None:
    manifest = result.manifest
    patches = manifest.patches or 0
    tokens = manifest.bytes + 2 * manifest.documents
    rows: dict[str, object] = {
        "output": str(output),
        "scheme": describe_scheme(scheme),
        "shards": len(manifest.shards),
        "of these already there": result.resumed_shards,
        "documents": manifest.documents,
        "bytes": format_bytes(manifest.bytes),
        "patches": patches,
        "mean patch length": f"{tokens / patches:.4f}" if patches else "no patches",
        "seconds": f"{seconds:.1f}",
    }
    if not result.resumed_shards and seconds > 0:
        rows["speed"] = f"{format_bytes(manifest.bytes / seconds)}/s"
    print_table("precompute", rows)


if __name__ == "__main__":
    main()
