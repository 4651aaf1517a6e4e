"""The records of tasks: what a finished task wrote. A task without a record is done again from its beginning.

Files of a task lie in a folder of its own under names that no other attempt uses (a worker that was given up for dead
may still be writing), and the record, written last and atomically, names them.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from blt_data.shards import ShardEntry
from blt_data.shards.files import atomic_file
from blt_data.skips import Skips
from blt_data.spill import SubRun

log = logging.getLogger(__name__)

_Record = TypeVar("_Record")

RECORD_NAME: Final = "record.json"

#: What datatrove's steps counted, in datatrove's format.
STATS_NAME: Final = "stats.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCount:
    """What went into a user's step and what came out of it."""

    name: str
    documents_in: int
    bytes_in: int
    documents_out: int
    bytes_out: int

    def plus(self, other: StepCount) -> StepCount:
        """Return the sum of this count and that of another task."""
        return StepCount(
            name=self.name,
            documents_in=self.documents_in + other.documents_in,
            bytes_in=self.bytes_in + other.bytes_in,
            documents_out=self.documents_out + other.documents_out,
            bytes_out=self.bytes_out + other.bytes_out,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Beyond:
    """The first document that a limit left out."""

    document_id: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterRecord:
    """What a scatter task spilled."""

    spill: str
    """Name of the spill file in the task's folder; its index has the same name and `.npy`."""
    spill_bytes: int
    documents: int
    """Documents that came, duplicates included."""
    content_bytes: int
    limit_bytes: int | None
    """The task's limit of content bytes."""
    boot: str | None
    """Names the time between two starts of the machine in which alone the spill file is to be trusted, because nobody
    waited until it was on the disk; None if it is on the disk. A kill leaves what was written; a loss of power does
    not, and then the task is done again. Most spill files are gone before a disk would have seen them."""
    beyond: Beyond | None
    """The document at which that limit ended the task; None if its source ended it."""
    sources: tuple[str, ...]
    """Names that the rows' `source` indexes."""
    sub_runs: tuple[SubRun, ...]
    cells: int
    """Rows of the table of cells in the index."""
    starts: tuple[int, ...]
    """For each sub-run, rows of its table of first documents in the index."""
    skipped: Skips = field(default_factory=Skips)
    steps: tuple[StepCount, ...] = ()

    def serves(self, limit_bytes: int | None) -> bool:
        """Return whether a task of another limit would have spilled the same.

        Args:
            limit_bytes: that limit.
        """
        if self.limit_bytes == limit_bytes:
            return True
        return self.beyond is None and (limit_bytes is None or self.content_bytes <= limit_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class CellCounts:
    """How much falls into each cell, duplicates included, so that it depends on no partition into tasks."""

    cells: npt.NDArray[np.uint64]
    """uint64 [c]: the cells that have documents, growing."""
    documents: npt.NDArray[np.int64]
    """int64 [c, splits]."""
    content_bytes: npt.NDArray[np.int64]
    """int64 [c, splits]."""

    @classmethod
    def total(cls, parts: Sequence[CellCounts], splits: int) -> CellCounts:
        """Return the sum of counts.

        Args:
            parts: what to add.
            splits: number of splits.
        """
        cells, inverse = np.unique(
            np.concatenate([np.empty(0, np.uint64), *(part.cells for part in parts)]), return_inverse=True
        )
        documents = np.zeros((len(cells), splits), np.int64)
        content_bytes = np.zeros_like(documents)
        at = 0
        for part in parts:
            where = inverse[at : at + len(part.cells)]
            # The cells of one part are distinct, so that no sum is lost.
            documents[where] += part.documents
            content_bytes[where] += part.content_bytes
            at += len(part.cells)
        return cls(cells=cells, documents=documents, content_bytes=content_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterIndex:
    """Where the cells of a scatter task are."""

    counts: CellCounts
    starts: tuple[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]], ...]
    """For each sub-run: uint64 [m] its cells, growing, and int64 [m] the first document of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherRecord:
    """What a gather task staged."""

    splits: Mapping[str, tuple[ShardEntry, ...]]
    """Split to its shards, in order."""
    skipped: Skips
    """Duplicates."""


def fresh_name(stem: str) -> str:
    """Return a file name that no other attempt of the task uses."""
    return f"{stem}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def boot_id() -> str | None:
    """Return what names the time since this machine was started, or None where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def write_index(path: Path, index: ScatterIndex) -> None:
    """Write the index of a spill file, as one int64 array.

    Args:
        path: the file.
        index: what to write.

    Raises:
        OSError: it cannot be written.
    """
    counts = index.counts
    splits = counts.documents.shape[1]
    at = len(counts.cells)
    rows = np.zeros((at + sum(len(cells) for cells, _ in index.starts), 1 + 2 * splits), np.int64)
    rows[:at, 0] = counts.cells.view(np.int64)
    rows[:at, 1 : 1 + splits] = counts.documents
    rows[:at, 1 + splits :] = counts.content_bytes
    for cells, first in index.starts:
        rows[at : at + len(cells), 0] = cells.view(np.int64)
        rows[at : at + len(cells), 1] = first
        at += len(cells)
    with atomic_file(path) as file:
        np.lib.format.write_array(file, rows, allow_pickle=False)


def read_index(folder: Path, record: ScatterRecord) -> ScatterIndex:
    """Read the index of a task's spill file.

    Args:
        folder: the task's folder.
        record: the task's record.

    Raises:
        OSError: it cannot be read.
    """
    rows = np.load(folder / f"{record.spill}.npy", allow_pickle=False)
    splits = (rows.shape[1] - 1) // 2
    table = rows[: record.cells]
    starts = []
    at = record.cells
    for count in record.starts:
        part = rows[at : at + count]
        starts.append((part[:, 0].copy().view(np.uint64), part[:, 1].copy()))
        at += count
    counts = CellCounts(
        cells=table[:, 0].copy().view(np.uint64),
        documents=table[:, 1 : 1 + splits],
        content_bytes=table[:, 1 + splits :],
    )
    return ScatterIndex(counts=counts, starts=tuple(starts))


def write_scatter_record(folder: Path, record: ScatterRecord) -> None:
    """Declare a scatter task finished.

    Args:
        folder: the task's folder.
        record: what is in it.

    Raises:
        OSError: it cannot be written.
    """
    value = {name: getattr(record, name) for name in ScatterRecord.__slots__}
    value["beyond"] = None if record.beyond is None else asdict(record.beyond)
    value["sub_runs"] = [asdict(run) for run in record.sub_runs]
    value["steps"] = [asdict(step) for step in record.steps]
    value["skipped"] = record.skipped.to_json()
    _write(folder, value)


def read_scatter_record(folder: Path) -> ScatterRecord | None:
    """Return the record of a finished scatter task, or None if it is not finished, or is damaged.

    Args:
        folder: the task's folder.
    """
    return _read(folder, _scatter_record)


def _scatter_record(folder: Path, value: dict[str, Any]) -> ScatterRecord | None:
    if value["boot"] not in (None, boot_id()):
        return None
    record = ScatterRecord(
        **{
            **value,
            "beyond": None if value["beyond"] is None else Beyond(**value["beyond"]),
            "sources": tuple(value["sources"]),
            "sub_runs": tuple(SubRun(**run) for run in value["sub_runs"]),
            "starts": tuple(value["starts"]),
            "skipped": Skips.from_json(value["skipped"]),
            "steps": tuple(StepCount(**step) for step in value["steps"]),
        }
    )
    index = np.load(folder / f"{record.spill}.npy", mmap_mode="r", allow_pickle=False)
    whole = index.ndim == 2 and len(index) == record.cells + sum(record.starts)
    return record if whole and _has_size(folder / record.spill, record.spill_bytes) else None


def write_gather_record(folder: Path, record: GatherRecord) -> None:
    """Declare a gather task finished.

    Args:
        folder: the task's folder.
        record: what is in it.

    Raises:
        OSError: it cannot be written.
    """
    splits = {split: [asdict(entry) for entry in entries] for split, entries in record.splits.items()}
    _write(folder, {"splits": splits, "skipped": record.skipped.to_json()})


def read_gather_record(folder: Path) -> GatherRecord | None:
    """Return the record of a finished gather task, or None if it is not finished, lacks a shard or is damaged.

    Args:
        folder: the task's folder.
    """
    return _read(folder, _gather_record)


def _gather_record(folder: Path, value: dict[str, Any]) -> GatherRecord | None:
    splits = {split: tuple(ShardEntry(**entry) for entry in entries) for split, entries in value["splits"].items()}
    if not all(_has_size(folder / entry.name, entry.file_bytes) for entries in splits.values() for entry in entries):
        return None
    return GatherRecord(splits=splits, skipped=Skips.from_json(value["skipped"]))


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _write(folder: Path, value: Mapping[str, object]) -> None:
    with atomic_file(folder / RECORD_NAME) as file:
        file.write(json.dumps(value).encode())


def _read(folder: Path, parse: Callable[[Path, dict[str, Any]], _Record | None]) -> _Record | None:
    """Return a task's record, or None if there is none that can be used: the task is then done again."""
    try:
        return parse(folder, json.loads((folder / RECORD_NAME).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError) as error:
        log.warning("%s: the record of a finished task is damaged (%s); the task is done again", folder, error)
        return None
