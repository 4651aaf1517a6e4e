"""Scattering: the documents of one task into a spill file, in sorted sub-runs of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt_data.documents import DocumentBatch
from blt_data.ordering import Ordering, Segments, content_keys, places, shuffle_keys
from blt_data.records import (
    Beyond,
    CellCounts,
    ScatterIndex,
    ScatterRecord,
    StepCount,
    boot_id,
    fresh_name,
    write_index,
)
from blt_data.scratch import Scratch
from blt_data.shards.schema import column_buffers
from blt_data.skips import Skips
from blt_data.spill import ROW, Rows, SpillFile
from blt_data.splits import split_indices

DUPLICATE: Final = "duplicate"

#: Bytes of memory per buffered document beside its content and its id: table row, sorted table, sort order, views.
_PER_DOCUMENT: Final = 300

#: Pieces handed to the system at once.
_PIECES: Final = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterOptions:
    """What every scatter task of a job is told."""

    ordering: Ordering
    splits: tuple[str, ...]
    holdout_fraction: float | None
    durable: bool
    """Whether spill files must outlive this machine's power; see `ScatterRecord.boot`."""
    buffer_bytes: int
    """Memory at which a sub-run is sorted and written; decides no byte of the output."""


@dataclass(slots=True)
class _Buffered:
    table: Rows
    """`ROW` [n]; `content` and `id` are the lengths as long as the documents wait."""
    ids: pa.Array
    """large_string [n]."""
    starts: npt.NDArray[np.int64]
    """int64 [n]: where in the buffer each content begins."""


class Scatter:
    """Collects the documents of one task; in source order they come, sorted by key they are written.

    Args:
        folder: the task's folder, which must exist.
        options: of the job.
        scratch: memory for the contents until they are written.
        limit_bytes: content bytes at which the task ends, whole documents only; None takes all.
        report: told of documents and content bytes since its last call.
    """

    def __init__(
        self,
        folder: Path,
        options: ScatterOptions,
        *,
        scratch: Scratch,
        limit_bytes: int | None = None,
        report: Callable[[int, int], None] = lambda documents, content_bytes: None,
    ) -> None:
        self.skipped = Skips()
        self.documents = self.content_bytes = 0
        self.beyond: Beyond | None = None
        self._folder, self._options, self._limit, self._report = folder, options, limit_bytes, report
        self._boot = None if options.durable else boot_id()
        self._segments = Segments(options.ordering.segment_bytes)
        self._sources: dict[str, int] = {}
        self._data = scratch.take(options.buffer_bytes)
        self._buffer: list[_Buffered] = []
        self._filled = self._beside = 0
        self._counts: list[CellCounts] = []
        self._starts: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = []
        self._file = SpillFile(folder / fresh_name("spill"), durable=self._boot is None)

    def __enter__(self) -> Scatter:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._buffer.clear()
        self._file.__exit__(*error)  # type: ignore[arg-type]  # the three arguments of every __exit__

    def add(self, batch: DocumentBatch, unit: int, order: npt.NDArray[np.int64] | None = None) -> bool:
        """Take documents.

        Args:
            batch: n documents that follow those of the last call.
            unit: ordinal of their unit in the job.
            order: int64 [n]: their order within the unit; None takes their rows.

        Returns:
            Whether more are wanted: False once the limit is reached.

        Raises:
            OSError: the spill file cannot be written.
        """
        taken = self._within_limit(batch)
        if len(taken):
            size = taken.content_bytes
            if self._filled + self._beside + size > len(self._data):
                self._flush(self._data)
            self._keep(taken, self._rows(taken, unit, batch.rows if order is None else order))
            self.documents += len(taken)
            self.content_bytes += size
            self._report(len(taken), size)
        return self.beyond is None

    def finish(self, *, skipped: Skips, steps: Sequence[StepCount] = ()) -> ScatterRecord:
        """Write what is left; the task is finished once its record is written, after the `with` block.

        Args:
            skipped: what was left out before the documents came here.
            steps: what the user's steps did.

        Raises:
            OSError: the spill file or its index cannot be written.
        """
        self._flush(self._data)
        self.skipped.merge(skipped)
        counts = CellCounts.total(self._counts, len(self._options.splits))
        index = ScatterIndex(counts=counts, starts=tuple(self._starts))
        write_index(self._folder / f"{self._file.path.name}.npy", index)
        return ScatterRecord(
            spill=self._file.path.name,
            spill_bytes=self._file.size,
            documents=self.documents,
            content_bytes=self.content_bytes,
            limit_bytes=self._limit,
            beyond=self.beyond,
            boot=self._boot,
            sources=tuple(self._sources),
            sub_runs=tuple(self._file.sub_runs),
            cells=len(counts.cells),
            starts=tuple(len(cells) for cells, _ in self._starts),
            skipped=self.skipped,
            steps=tuple(steps),
        )

    def _within_limit(self, batch: DocumentBatch) -> DocumentBatch:
        if self._limit is None:
            return batch
        ends = self.content_bytes + (batch.offsets[1:] - batch.offsets[0])
        fitting = int(np.searchsorted(ends, self._limit, side="right"))
        if fitting < len(batch):
            size = int(batch.offsets[fitting + 1] - batch.offsets[fitting])
            self.beyond = Beyond(document_id=batch.document_ids[fitting].as_py(), bytes=size)
            return batch.slice(0, fitting)
        return batch

    def _rows(self, batch: DocumentBatch, unit: int, order: npt.NDArray[np.int64]) -> Rows:
        ordering = self._options.ordering
        table = np.zeros(len(batch), ROW)
        if ordering.seed is None:
            table["key"] = self._segments.keys(unit, batch)
        elif ordering.deduplicate:
            table["key"], table["check"] = content_keys(batch, ordering.seed)
        else:
            table["key"] = shuffle_keys(batch, ordering.seed)
        table["place"] = places(unit, order[: len(batch)])
        table["content"] = np.diff(batch.offsets)
        offsets, _ = column_buffers(batch.document_ids)
        table["id"] = np.diff(offsets)
        table["source"] = self._sources.setdefault(batch.source, len(self._sources))
        table["split"] = split_indices(batch.document_ids, self._options.holdout_fraction)
        return table

    def _keep(self, batch: DocumentBatch, table: Rows) -> None:
        """Copy documents into the buffer; those that are larger than all of it are written at once."""
        offsets, data, size = batch.offsets, batch.data, batch.content_bytes
        fits = self._filled + size <= len(self._data)
        starts = offsets[:-1] - offsets[0] + self._filled if fits else offsets[:-1]
        self._buffer.append(_Buffered(table=table, ids=batch.document_ids.cast(pa.large_string()), starts=starts))
        if not fits:
            self._flush(data)
            return
        self._data[self._filled : self._filled + size] = data[int(offsets[0]) : int(offsets[-1])]
        self._filled += size
        self._beside += batch.document_ids.nbytes + _PER_DOCUMENT * len(batch)

    def _flush(self, data: npt.NDArray[np.uint8]) -> None:
        """Sort what is buffered and append it to the spill file as a sub-run.

        Args:
            data: uint8: where the contents are.
        """
        if not self._buffer:
            return
        table = np.concatenate([item.table for item in self._buffer])
        # Stable: documents that a step made of one keep their order.
        order = np.lexsort((table["place"], table["check"], table["key"]))
        cells = self._options.ordering.cells(table["key"][order])
        self._counts.append(count_cells(cells, table[order], len(self._options.splits)))
        if self._options.ordering.deduplicate:
            kept = first_of_equal(table[order])
            dropped = table["content"][order[~kept]]
            if len(dropped):
                self.skipped.add(DUPLICATE, count=len(dropped), bytes=int(dropped.sum()))
            order, cells = order[kept], cells[kept]
        first = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), cells[1:] != cells[:-1]]))
        self._starts.append((cells[first], first))
        _, ids = column_buffers(pa.concat_arrays([item.ids for item in self._buffer]).take(pa.array(order)))
        starts = np.concatenate([item.starts for item in self._buffer])[order]
        rows = table[order]
        self._file.append(_with_offsets(rows), ids.data, _pieces(data.data, starts, starts + rows["content"]))
        self._buffer.clear()
        self._filled = self._beside = 0


def count_cells(cells: npt.NDArray[np.uint64], rows: Rows, splits: int) -> CellCounts:
    """Return how many documents and content bytes fall into each cell.

    Args:
        cells: uint64 [n]: each row's cell, growing.
        rows: `ROW` [n], with the length of the content in `content`.
        splits: number of splits.
    """
    distinct, inverse = np.unique(cells, return_inverse=True)
    documents = np.zeros((len(distinct), splits), np.int64)
    content_bytes = np.zeros_like(documents)
    np.add.at(documents, (inverse, rows["split"]), 1)
    np.add.at(content_bytes, (inverse, rows["split"]), rows["content"])
    return CellCounts(cells=distinct, documents=documents, content_bytes=content_bytes)


def first_of_equal(rows: Rows) -> npt.NDArray[np.bool_]:
    """Return which documents come first among those of their content.

    Args:
        rows: `ROW` [n], sorted by (key, check, place).

    Returns:
        bool [n].
    """
    first = np.ones(len(rows), np.bool_)
    same = (rows["key"][1:] == rows["key"][:-1]) & (rows["check"][1:] == rows["check"][:-1])
    first[1:] = ~same
    return first


def _with_offsets(rows: Rows) -> Rows:
    """Return the table of a sub-run: lengths become offsets, and a last row says where the last document ends."""
    table = np.zeros(len(rows) + 1, ROW)
    table[:-1] = rows
    for name in ("content", "id"):
        table[name][0] = 0
        np.cumsum(rows[name], out=table[name][1:])
    return table


def _pieces(data: memoryview, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Iterator[list[memoryview]]:
    """Yield the contents between starts and ends, without copying them."""
    for at in range(0, len(starts), _PIECES):
        places = zip(starts[at : at + _PIECES].tolist(), ends[at : at + _PIECES].tolist(), strict=True)
        yield [data[start:end] for start, end in places]
