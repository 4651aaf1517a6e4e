"""`blt-patch precompute`: byte shards to patched shards."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from blt_data import Manifest, ShardDirectory, ShardEntry, ShardKind
from blt_data.console import ByteSize, JobProgress, format_bytes, friendly_errors, print_table, progress
from blt_data.errors import InputError
from blt_data.executors import Report
from blt_data.framing import FRAME_TOKENS
from blt_data.units import NewDirectory
from blt_patcher.batching import compare_batchings
from blt_patcher.calibrate import Sample, calibrate, take_sample
from blt_patcher.commands.entropy_source import EntropySource, entropy_source
from blt_patcher.commands.model_options import ModelOptions, model_options
from blt_patcher.commands.options import ResolvedScheme, SchemeChoice, sample_option, scheme_choice_options
from blt_patcher.commands.results import print_result
from blt_patcher.commands.scoring import as_entropy_based, warn_of_miss
from blt_patcher.commands.worker_options import WorkerOptions, parse_shards, worker_options
from blt_patcher.precompute import PrecomputeResult, check_arguments, precompute
from blt_patcher.schemes import PatchScheme
from blt_patcher.scorers import Scorer

#: Bytes of a float16.
_ENTROPY_BYTES = 2


@click.command(
    "precompute",
    epilog="Example: blt-patch precompute data/bytes --output data/patched --entropy-model runs/entropy/latest "
    "--target-patch-length 4.5. Without a model: blt-patch precompute data/bytes --output data/space --scheme space. "
    "On a Ray cluster: … --executor ray --ray-address auto --workers 8 --num-gpus 1. As array jobs: … --threshold 1.4 "
    "--only-shards 0-9, … --only-shards 10-19",
)
@click.argument("byte_shards", metavar="BYTES", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=NewDirectory(), metavar="DIR", help="Directory to write.")
@click.option("--entropy-model", type=click.Path(path_type=Path), metavar="M", help="Model or run.")
@sample_option
@click.option(
    "--entropies",
    type=click.Choice(["float16", "none"]),
    default="none",
    show_default=True,
    help="Store the entropies beside the patch lengths, two bytes a token, or drop them.",
)
@click.option(
    "--only-shards",
    metavar="LIST",
    help="Patch only these, counted from 0, such as 3-17,20; whoever finds all finished writes the manifest.",
)
@click.option(
    "--check-batching",
    type=ByteSize(),
    metavar="SIZE",
    help="At the end score so many bytes in two batchings and count boundaries that differ.",
)
@friendly_errors
@scheme_choice_options
@model_options
@worker_options
def precompute_command(
    byte_shards: Path,
    output: Path,
    entropy_model: Path | None,
    choice: SchemeChoice,
    sample_bytes: int,
    entropies: str,
    only_shards: str | None,
    check_batching: int | None,
    running: ModelOptions,
    placing: WorkerOptions,
) -> None:
    """Write patched shards of the byte shards in BYTES.

    Interrupted, run the same command again: finished shards are kept, and the result is the same to the byte, with any
    number of workers on this machine or on a cluster.
    """
    request = choice.resolve()
    check_arguments(request.scheme, entropy_model is not None, entropies == "float16")
    if check_batching is not None and entropy_model is None:
        raise InputError("--check-batching scores documents, so it needs --entropy-model; leave it out, or name one")
    source = ShardDirectory.open(byte_shards, kind=ShardKind.BYTES)
    only = parse_shards(only_shards, len(source)) if only_shards is not None else None
    with entropy_source(running.spec(entropy_model), placing) as where:
        if where.scorer is not None:
            choice.check_model(where.scorer.identity)
        scheme, record = _scheme(request, source, sample_bytes, where)
        started = time.monotonic()
        with PatchProgress(source, only) as bar:
            result = precompute(
                source,
                output,
                scheme=scheme,
                scorer=where.scorer,
                keep_entropies=entropies == "float16",
                calibration=record,
                report=bar.advance,
                on_shard=bar.count,
                workers=where.workers,
                only=only,
            )
        more = _sizes(result, where.scorer is not None)
        if result.missing_shards:
            more["shards still missing"] = result.missing_shards
        print_result("precompute", output, scheme, result, time.monotonic() - started, more)
        if check_batching is not None and where.scorer is not None:
            _check_batching(where, scheme, source, check_batching)


class PatchProgress(JobProgress):
    """Progress that also tells the mean patch length of the shards that are finished.

    Args:
        source: the byte shards.
        only: which of them are to be patched; None for all.
    """

    def __init__(self, source: ShardDirectory, only: list[int] | None) -> None:
        shards = source.manifest.shards
        entries = shards if only is None else [shards[index] for index in only]
        tokens = sum(entry.bytes + FRAME_TOKENS * entry.documents for entry in entries)
        super().__init__("patching", total_bytes=tokens, total_files=len(entries), noun="shards")
        self._finished_tokens = self._finished_patches = 0

    def count(self, entry: ShardEntry, early: bool) -> None:
        """Count a finished shard.

        Args:
            entry: of the shard.
            early: whether an earlier run had finished it, so that nothing else was told of it.
        """
        tokens = entry.bytes + FRAME_TOKENS * entry.documents
        self._finished_tokens += tokens
        self._finished_patches += entry.patches or 0
        self.advance(tokens if early else 0, entry.documents if early else 0, 0, files=1)

    def status(self) -> str:
        """Return the state as one line."""
        line = super().status()
        if not self._finished_patches:
            return line
        return f"{line}, {self._finished_tokens / self._finished_patches:.2f} tokens a patch"


def score_sample(
    scorer: Scorer, report: Report, content: npt.NDArray[np.uint8], content_offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float16]:
    """Return a sample's entropies, float16 [N + 2D] nats; see `Scorer.score`."""
    return scorer.score(content, content_offsets, name="the sample", advance=lambda n: report(n, 0, n))


def _check_batching(where: EntropySource, scheme: PatchScheme, source: ShardDirectory, size: int) -> None:
    sample = take_sample(source, size)
    with progress("checking batchings", 2 * _tokens(sample), "B") as bar:
        report = where.call(
            compare_batchings,
            scheme,
            sample.content,
            sample.content_offsets,
            on_progress=lambda tokens, *_: bar.advance(tokens),
        )
    print_table("the same documents in their order and in the reverse order", report.rows())


def _tokens(sample: Sample) -> int:
    return sample.content.size + FRAME_TOKENS * (sample.content_offsets.size - 1)


def _scheme(
    request: ResolvedScheme, source: ShardDirectory, sample_bytes: int, where: EntropySource
) -> tuple[PatchScheme, Mapping[str, Any] | None]:
    """Return the scheme and how its threshold was found, finding it if that is asked for."""
    if request.free is None or request.target is None or where.scorer is None:
        return request.scheme, request.calibration
    scheme = as_entropy_based(request.scheme)
    sample = take_sample(source, sample_bytes)
    with progress("scoring the sample", _tokens(sample), "B") as bar:
        nats = where.call(
            score_sample,
            sample.content,
            sample.content_offsets,
            on_progress=lambda tokens, *_: bar.advance(tokens),
        )
    found = calibrate(scheme, request.free, request.target, sample.content, sample.content_offsets, nats)
    warn_of_miss(found)
    return found.scheme, {**found.to_json(), "sample": sample.statement}


def _sizes(result: PrecomputeResult, scored: bool) -> dict[str, object]:
    """Return rows that tell what the shards take on disk with and without entropies."""
    if not scored:
        return {"on disk": format_bytes(sum(entry.file_bytes for entry in result.manifest.shards))}
    kept = any(entry.entropies for entry in result.manifest.shards)
    with_them, without = sizes_of_choices(result.manifest)
    return {
        "on disk, entropies float16": format_bytes(with_them) + ("" if kept else "  (not chosen)"),
        "on disk, entropies none": format_bytes(without) + ("  (not chosen)" if kept else ""),
    }


def sizes_of_choices(manifest: Manifest) -> tuple[int, int]:
    """Return the bytes that patched shards take with entropies and without, of which one is counted, the other told.

    Args:
        manifest: of patched shards.
    """
    size = sum(entry.file_bytes for entry in manifest.shards)
    entropies = _ENTROPY_BYTES * (manifest.bytes + FRAME_TOKENS * manifest.documents)
    if any(entry.entropies for entry in manifest.shards):
        return size, size - entropies
    return size + entropies, size
