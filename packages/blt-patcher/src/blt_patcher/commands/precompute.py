"""`blt-patch precompute`: byte shards to patched shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import format_bytes, friendly_errors, print_table, progress
from blt_data.errors import InputError
from blt_patcher.calibrate import take_sample
from blt_patcher.commands.options import sample_option, scheme_options, scoring_options
from blt_patcher.commands.scoring import make_scorer, score_and_calibrate, warn_of_miss
from blt_patcher.precompute import PrecomputeResult, check_arguments, precompute
from blt_patcher.scheme_options import SchemeOptions, resolve_scheme
from blt_patcher.schemes import SCHEMES, PatchScheme, describe_scheme


@click.command(
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
@scheme_options
@sample_option
@click.option("--keep-entropies", is_flag=True, help="Store the entropies beside the patch lengths.")
@scoring_options
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
        scorer = make_scorer(entropy_model, window_tokens, device, compile_model)
    elif window_tokens is not None or device is not None or compile_model:
        raise InputError("--window-tokens, --device and --compile are for an entropy model; leave them out")
    patch_scheme: PatchScheme = request.scheme
    record: dict[str, Any] | None = None
    if request.free is not None and target_patch_length is not None and scorer is not None:
        sample = take_sample(source, sample_bytes)
        found = score_and_calibrate(request.scheme, request.free, target_patch_length, sample, scorer)
        warn_of_miss(found)
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
