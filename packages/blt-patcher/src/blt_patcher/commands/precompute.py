"""`blt-patch precompute`: byte shards to patched shards."""

from __future__ import annotations

import time
from pathlib import Path

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import friendly_errors, progress
from blt_data.errors import InputError
from blt_patcher.calibrate import take_sample
from blt_patcher.commands.options import SchemeChoice, sample_option, scheme_choice_options, scoring_options
from blt_patcher.commands.results import print_result
from blt_patcher.commands.scoring import make_scorer, score_and_calibrate, warn_of_miss
from blt_patcher.precompute import check_arguments, precompute
from blt_patcher.schemes import PatchScheme


@click.command(
    "precompute",
    epilog="Example: blt-patch precompute data/bytes --output data/patched --entropy-model runs/entropy/latest "
    "--target-patch-length 4.5. Without a model: blt-patch precompute data/bytes --output data/space --scheme space",
)
@click.argument("byte_shards", metavar="BYTES", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Directory to write.")
@click.option("--entropy-model", type=click.Path(path_type=Path), metavar="M", help="Model or run.")
@sample_option
@click.option("--keep-entropies", is_flag=True, help="Store the entropies beside the patch lengths.")
@scoring_options
@friendly_errors
@scheme_choice_options
def precompute_command(
    byte_shards: Path,
    output: Path,
    entropy_model: Path | None,
    choice: SchemeChoice,
    sample_bytes: int,
    keep_entropies: bool,
    window_tokens: int | None,
    device: str | None,
    compile_model: bool,
) -> None:
    """Write patched shards of the byte shards in BYTES.

    Interrupted, run the same command again: finished shards are kept, and the result is the same to the byte.
    """
    request = choice.resolve()
    check_arguments(request.scheme, entropy_model is not None, keep_entropies)
    source = ShardDirectory.open(byte_shards, kind=ShardKind.BYTES)
    scorer = None
    if entropy_model is not None:
        scorer = make_scorer(entropy_model, window_tokens, device, compile_model)
    elif window_tokens is not None or device is not None or compile_model:
        raise InputError("--window-tokens, --device and --compile are for an entropy model; leave them out")
    patch_scheme: PatchScheme = request.scheme
    record = request.calibration
    if scorer is not None:
        choice.check_model(scorer.identity)
    if request.free is not None and request.target is not None and scorer is not None:
        sample = take_sample(source, sample_bytes)
        found = score_and_calibrate(request.scheme, request.free, request.target, sample, scorer)
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
    print_result("precompute", output, patch_scheme, result, time.monotonic() - started)
