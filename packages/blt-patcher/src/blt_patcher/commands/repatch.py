"""`blt-patch repatch`: new boundaries from stored entropies."""

from __future__ import annotations

import time
from pathlib import Path

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import friendly_errors, progress
from blt_data.framing import FRAME_TOKENS
from blt_data.units import NewDirectory
from blt_patcher.calibrate import calibrate, take_sample
from blt_patcher.commands.options import SchemeChoice, sample_option, scheme_choice_options
from blt_patcher.commands.results import print_result
from blt_patcher.commands.scoring import as_entropy_based, warn_of_miss
from blt_patcher.repatch import check_source, repatch

_KEEP = {"float16": True, "none": False, None: None}


@click.command(
    "repatch",
    epilog="Example: blt-patch repatch data/patched --output data/patched-6 --target-patch-length 6. "
    "Another scheme: blt-patch repatch data/patched --output data/space --scheme space --entropies none",
)
@click.argument("patched_shards", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=NewDirectory(), metavar="DIR", help="Directory to write.")
@sample_option
@click.option(
    "--entropies",
    type=click.Choice(["float16", "none"]),
    help="Store the entropies in the new shards too, or drop them  [float16 where DIR has them].",
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Shards done at once  [one a processor].")
@friendly_errors
@scheme_choice_options
def repatch_command(
    patched_shards: Path,
    output: Path,
    choice: SchemeChoice,
    sample_bytes: int,
    entropies: str | None,
    workers: int | None,
) -> None:
    """Cut the documents in DIR into patches anew, from the entropies stored there, without a model.

    The result is the same to the byte as if the byte shards were patched from scratch with the same model. Schemes
    that read no entropies need none stored. Interrupted, run the same command again: finished shards are kept.
    """
    request = choice.resolve()
    source = ShardDirectory.open(patched_shards, kind=ShardKind.PATCHED)
    keep = check_source(source, request.scheme, _KEEP[entropies])
    scheme, record = request.scheme, request.calibration
    if scheme.needs_entropies:
        model = source.manifest.provenance.get("entropy_model")
        choice.check_model(model if isinstance(model, dict) else None)
    if request.free is not None and request.target is not None:
        sample = take_sample(source, sample_bytes)
        assert sample.entropies is not None, "check_source saw to it"
        found = calibrate(
            as_entropy_based(scheme),
            request.free,
            request.target,
            sample.content,
            sample.content_offsets,
            sample.entropies,
        )
        warn_of_miss(found)
        scheme, record = found.scheme, {**found.to_json(), "sample": sample.statement}
    started = time.monotonic()
    tokens = source.manifest.bytes + FRAME_TOKENS * source.manifest.documents
    with progress("patching", tokens, "B") as bar:
        result = repatch(
            source,
            output,
            scheme=scheme,
            keep_entropies=keep,
            calibration=record,
            workers=workers,
            advance=bar.advance,
        )
    print_result("repatch", output, scheme, result, time.monotonic() - started)
