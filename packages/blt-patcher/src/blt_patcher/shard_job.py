"""One byte shard to one patched shard: what a worker does, in this process or anywhere else.

A shard's checksums are verified beside its scoring. In one process the next shard is scored while the last is written
(`patch_in_this_process`); a worker of an executor does one shard after another (`start_worker`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt_data import Shard, ShardDirectory, ShardEntry, ShardKind, write_shard
from blt_data.errors import InputError
from blt_data.executors import Report
from blt_data.framing import FRAME_TOKENS
from blt_patcher.boundaries import patch_documents
from blt_patcher.schemes import PatchScheme
from blt_patcher.scorers import Scorer, check_same_scorer
from blt_patcher.windows import framed_offsets

#: Arrow's lists count their items in 32 bits.
_LARGEST_LIST: Final = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """What there is to do with every shard; picklable."""

    source: ShardDirectory
    """The byte shards."""
    output: Path
    """The directory to write to."""
    scheme: PatchScheme
    """How to patch."""
    keep_entropies: bool
    """Whether to store entropies."""
    provenance: Mapping[str, Any]
    """What the new shards say of their making."""


def start_worker(
    job: ShardJob, load_scorer: Callable[[], Scorer] | None
) -> Callable[[int, Report], tuple[ShardEntry, int]]:
    """Load the scorer and return the function that patches shard `index`; for executors.

    Args:
        job: what to do.
        load_scorer: gives the scorer, or None if no entropies are needed.

    Raises:
        InputError: the scorer is another than the job was started with, or cannot be loaded.
    """
    scorer = load_scorer() if load_scorer is not None else None
    if scorer is not None:
        check_same_scorer(scorer, job.provenance, "a worker")

    def patch(index: int, report: Report) -> tuple[ShardEntry, int]:
        with ThreadPoolExecutor(1, thread_name_prefix="blt-verify") as verifier:
            scored = _score(job, index, scorer, verifier, report)
            return _write(job, scored, report), index

    return patch


def patch_in_this_process(
    job: ShardJob,
    scorer: Scorer | None,
    indices: Sequence[int],
    on_entry: Callable[[int, ShardEntry], None],
    report: Report,
) -> None:
    """Patch some shards, one being verified and scored while the one before is cut and written.

    What has been scored is written even if the next shard fails.

    Args:
        job: what to do.
        scorer: gives the entropies, or None if none are needed.
        indices: which shards, in this order.
        on_entry: called with a shard's index and entry when it is written, in another thread.
        report: called with tokens, documents and tokens again done since the last call, from two threads.

    Raises:
        InputError: see `patch_shard`.
        OSError: a file cannot be written.
    """

    def write(index: int, scored: _Scored) -> None:
        on_entry(index, _write(job, scored, report))

    writing: Future[None] | None = None
    # The last pool to be entered is the first to be waited for.
    with (
        ThreadPoolExecutor(1, thread_name_prefix="blt-verify") as verifier,
        ThreadPoolExecutor(1, thread_name_prefix="blt-write") as writer,
    ):
        for index in indices:
            scored = _score(job, index, scorer, verifier, report)
            if writing is not None:
                writing.result()
            writing = writer.submit(write, index, scored)
        if writing is not None:
            writing.result()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """A shard that is ready to be cut and written."""

    shard: Shard
    verified: Future[Shard]
    name: str
    nats: npt.NDArray[np.float16] | None


def _score(job: ShardJob, index: int, scorer: Scorer | None, verifier: ThreadPoolExecutor, report: Report) -> _Scored:
    """Score a shard while its checksums are verified."""
    entry = job.source.manifest.shards[index]
    shard = Shard.open(job.source.path / entry.name)
    verified = verifier.submit(job.source.verified_shard, index)
    offsets, content = shard.content_column()
    nats = None
    if entry.bytes + FRAME_TOKENS * entry.documents > _LARGEST_LIST:
        raise InputError(f"{shard.path}: has too many tokens for one shard; prepare the data in smaller shards")
    if scorer is not None:
        nats = scorer.score(content, offsets, name=str(shard.path), advance=lambda n: report(n, 0, n))
    return _Scored(shard=shard, verified=verified, name=entry.name, nats=nats)


def _write(job: ShardJob, scored: _Scored, report: Report) -> ShardEntry:
    """Cut and write a shard once its checksums are known to be right."""
    scored.verified.result()
    entry = patch_shard(
        scored.shard,
        job.output / scored.name,
        scheme=job.scheme,
        nats=scored.nats,
        keep_entropies=job.keep_entropies,
        provenance=job.provenance,
    )
    tokens = 0 if scored.nats is not None else entry.bytes + FRAME_TOKENS * entry.documents
    report(tokens, entry.documents, tokens)
    return entry


def patch_shard(
    shard: Shard,
    path: Path,
    *,
    scheme: PatchScheme,
    nats: npt.NDArray[np.float16] | None,
    keep_entropies: bool,
    provenance: Mapping[str, Any],
) -> ShardEntry:
    """Write the patched form of one byte shard; the file appears only when it is whole.

    Args:
        shard: the byte shard.
        path: the file to write.
        scheme: how to patch.
        nats: float16 [N + 2D] entropies after each framed token, or None if none are needed.
        keep_entropies: store the entropies too.
        provenance: what the new shard says of its making.

    Returns:
        The new shard's entry for the manifest.

    Raises:
        InputError: the entropies are not finite.
        OSError: the file cannot be written.
    """
    offsets, content = shard.content_column()
    patched = patch_documents(scheme, content, offsets, nats)
    return write_shard(
        path,
        kind=ShardKind.PATCHED,
        document_ids=shard.batch.column("document_id"),
        contents=shard.batch.column("content"),
        sources=shard.batch.column("source"),
        patch_lengths=list_column(patched.offsets, patched.lengths),
        entropies=list_column(framed_offsets(offsets), nats) if keep_entropies and nats is not None else None,
        provenance=provenance,
    )


def list_column(offsets: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> pa.Array:
    """Return an Arrow list column over values, without copying them.

    Args:
        offsets: int64 [D + 1] where each document's values begin; the last at most 2³¹ − 1.
        values: [V] all documents' values.
    """
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
