"""From the cells that the scatter tasks filled to groups of consecutive cells: one gather task, about one shard, each.

Groups depend on the documents and the options alone. Where the documents of each group lie in each sub-run is worked
out once per job and kept in a file, so that a gather task reads no index.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from blt_data.ordering import MAX_DOCUMENTS
from blt_data.records import CellCounts, ScatterRecord, read_index
from blt_data.shards.files import atomic_file
from blt_data.spill import SubRun

#: A boundary file's bytes: one row of (groups + 1) document numbers for each sub-run.
_BOUND: Final = np.dtype("<i8")

#: Indexes held in memory while they are added up.
_AT_ONCE: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Spilled:
    """A finished scatter task."""

    folder: Path
    key: str
    """Names what the task read, and how."""
    record: ScatterRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The documents of one group in one sub-run."""

    path: Path
    """The spill file."""
    sources: tuple[str, ...]
    run: SubRun
    start: int
    """First document."""
    stop: int
    """One past the last document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """The gather tasks of a job."""

    key: str
    """Names the documents and where they are cut into groups; gather tasks of another key are of another job."""
    boundaries: npt.NDArray[np.uint64]
    """uint64 [groups]: the first cell of each group."""
    documents: npt.NDArray[np.int64]
    """int64 [groups]: documents of each, duplicates included."""
    content_bytes: npt.NDArray[np.int64]
    """int64 [groups]."""
    bounds: Path
    """The boundary file."""
    spilled: tuple[Spilled, ...]

    def __len__(self) -> int:
        return len(self.boundaries)

    def pieces(self, group: int) -> Iterator[Piece]:
        """Yield where the documents of a group are, in source order of the tasks.

        Args:
            group: index of the group.

        Raises:
            OSError: the boundary file cannot be read.
        """
        width = (len(self) + 1) * _BOUND.itemsize
        descriptor = os.open(self.bounds, os.O_RDONLY)
        try:
            at = group * _BOUND.itemsize
            for task in self.spilled:
                for run in task.record.sub_runs:
                    start, stop = np.frombuffer(os.pread(descriptor, 2 * _BOUND.itemsize, at), _BOUND).tolist()
                    at += width
                    if start < stop:
                        path = task.folder / task.record.spill
                        yield Piece(path=path, sources=task.record.sources, run=run, start=start, stop=stop)
        finally:
            os.close(descriptor)


def plan_groups(spilled: Sequence[Spilled], folder: Path, *, splits: int, shard_bytes: int) -> GroupPlan:
    """Group the cells of finished scatter tasks.

    Args:
        spilled: the tasks, in source order.
        folder: where the boundary file goes.
        splits: number of splits.
        shard_bytes: content bytes that the largest split of a group has at most, unless one cell has more.

    Raises:
        OSError: an index cannot be read, or the boundary file cannot be written.
    """
    total = CellCounts.total([], splits)
    for at in range(0, len(spilled), _AT_ONCE):
        parts = [read_index(task.folder, task.record).counts for task in spilled[at : at + _AT_ONCE]]
        total = CellCounts.total([total, *parts], splits)
    starts = _cut(total, shard_bytes)
    boundaries = total.cells[starts]
    # Which sub-runs there are depends on the memory that a task had, so the boundary file is named after them.
    digest = hashlib.sha256("".join(f"{task.key}\n" for task in spilled).encode() + boundaries.tobytes())
    key = digest.hexdigest()[:32]
    digest.update("".join(f"{task.record.spill}\n" for task in spilled).encode())
    bounds = folder / f"bounds-{digest.hexdigest()[:32]}"
    if not bounds.exists():
        _write_bounds(bounds, spilled, boundaries)
    documents, content_bytes = total.documents.sum(axis=1), total.content_bytes.sum(axis=1)
    return GroupPlan(
        key=key,
        boundaries=boundaries,
        documents=np.add.reduceat(documents, starts) if len(starts) else documents,
        content_bytes=np.add.reduceat(content_bytes, starts) if len(starts) else content_bytes,
        bounds=bounds,
        spilled=tuple(spilled),
    )


def _cut(total: CellCounts, shard_bytes: int) -> list[int]:
    """Return the index of the first cell of each group: each takes as many cells as fit, and at least one."""
    of_bytes = _running(total.content_bytes)
    of_documents = _running(total.documents.sum(axis=1, keepdims=True))
    starts = []
    at = 0
    while at < len(total.cells):
        starts.append(at)
        ends = [np.searchsorted(column, column[at] + shard_bytes, side="right") - 1 for column in of_bytes.T]
        ends.append(np.searchsorted(of_documents[:, 0], of_documents[at, 0] + MAX_DOCUMENTS, side="right") - 1)
        at = max(at + 1, int(min(ends)))
    return starts


def _running(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return sums over the cells before each: int64 [c + 1, columns]."""
    return np.concatenate([np.zeros((1, counts.shape[1]), np.int64), np.cumsum(counts, axis=0)])


def _write_bounds(path: Path, spilled: Sequence[Spilled], boundaries: npt.NDArray[np.uint64]) -> None:
    """Write, for each sub-run, the first document at or after each boundary, and the number of documents."""
    with atomic_file(path) as file:
        for task in spilled:
            index = read_index(task.folder, task.record)
            for run, (cells, first) in zip(task.record.sub_runs, index.starts, strict=True):
                with_end = np.append(first, run.documents)
                bounds = with_end[np.searchsorted(cells, boundaries)]
                file.write(np.append(bounds, run.documents).astype(_BOUND).tobytes())
