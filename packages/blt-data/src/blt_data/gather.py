"""Gathering: one group of cells out of all spill files, in order and without duplicates, into staged shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt_data.groups import GroupPlan, Piece
from blt_data.ordering import MAX_DOCUMENTS, Ordering
from blt_data.records import GatherRecord, write_gather_record
from blt_data.scatter import DUPLICATE, first_of_equal
from blt_data.scratch import Scratch
from blt_data.shards import JSON, ShardEntry, ShardKind, write_shard
from blt_data.skips import Skips
from blt_data.spill import ROW, Rows, SpillReader, damaged

Compression: TypeAlias = Literal["none", "zstd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherOptions:
    """What every gather task of a job is told."""

    ordering: Ordering
    provenance: Mapping[str, Mapping[str, JSON]]
    """Split to what its shards say of where they come from."""
    sources: tuple[str, ...] | None
    """Names of all sources in their order; None puts those of a shard in alphabetical order."""
    shard_bytes: int
    """Content bytes at which a shard is full; a larger document has its own."""
    compression: Compression


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Documents in their final order, with their contents."""

    document_ids: pa.StringArray
    contents: pa.LargeBinaryArray
    sources: pa.DictionaryArray


class Group:
    """The documents of one group: what is known of each, and their contents when they are asked for.

    Args:
        plan: of the job.
        index: which group.
        ordering: of the job.

    Raises:
        InputError: a spill file is damaged.
        OSError: one cannot be read.
    """

    def __init__(self, plan: GroupPlan, index: int, ordering: Ordering) -> None:
        self.skipped = Skips()
        self._pieces = list(plan.pieces(index))
        tables, ids, lengths = [], [], []
        for piece in self._pieces:
            with SpillReader(piece.path) as file:
                table = file.table(piece.run, piece.start, piece.stop)
                _check(table, piece)
                ids.append(file.ids(piece.run, int(table["id"][0]), int(table["id"][-1])))
            lengths.append(np.diff(table["content"]))
            tables.append(table)
        self._rows: Rows = np.concatenate([np.empty(0, ROW), *(table[:-1] for table in tables)])
        self._owner = np.repeat(np.arange(len(tables)), [len(table) - 1 for table in tables])
        self._lengths = np.concatenate([np.empty(0, np.int64), *lengths])
        self._ids = _strings([np.diff(table["id"]) for table in tables], ids)
        self._names = [name for piece in self._pieces for name in piece.sources]
        firsts = np.cumsum([0, *(len(piece.sources) for piece in self._pieces)])
        self._source = firsts[self._owner] + self._rows["source"]
        self.order = self._sorted(ordering)

    def _sorted(self, ordering: Ordering) -> npt.NDArray[np.int64]:
        rows = self._rows
        # Stable, and the pieces are in source order.
        order = np.lexsort((rows["place"], rows["check"], rows["key"]))
        if ordering.deduplicate:
            kept = first_of_equal(rows[order])
            if len(dropped := order[~kept]):
                self.skipped.add(DUPLICATE, count=len(dropped), bytes=int(self._lengths[dropped].sum()))
            order = order[kept]
        return order

    def shards(self, split: int, shard_bytes: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the documents of each shard of a split: one shard, but where a cell is larger than a shard.

        Args:
            split: index of the split.
            shard_bytes: content bytes at which a shard is full; a larger document has its own.

        Yields:
            int64 [n]: documents of the group, in their final order.
        """
        chosen = self.order[self._rows["split"][self.order] == split]
        ends = np.cumsum(self._lengths[chosen])
        at = 0
        while at < len(chosen):
            before = int(ends[at - 1]) if at else 0
            stop = int(np.searchsorted(ends, before + shard_bytes, side="right"))
            stop = min(max(stop, at + 1), at + MAX_DOCUMENTS)
            yield chosen[at:stop]
            at = stop

    def read(self, chosen: npt.NDArray[np.int64], sources: Sequence[str] | None, scratch: Scratch) -> Documents:
        """Read documents.

        Args:
            chosen: int64 [n]: documents of the group, in the order wanted.
            sources: names of all sources in their order, or None.
            scratch: where the contents go.

        Raises:
            InputError: a spill file is damaged.
            OSError: one cannot be read.
        """
        offsets = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(self._lengths[chosen], out=offsets[1:])
        data = scratch.take(int(offsets[-1]))
        self._read_contents(chosen, offsets, data.data)
        contents = pa.Array.from_buffers(
            pa.large_binary(), len(chosen), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
        )
        return Documents(
            document_ids=self._ids.take(pa.array(chosen)).cast(pa.string()),
            contents=contents,
            sources=source_column([self._names[index] for index in self._source[chosen].tolist()], sources),
        )

    def _read_contents(self, chosen: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], data: memoryview) -> None:
        """Put each document where it belongs; neighbours in a spill file are read with one call."""
        by_file = np.argsort(chosen, kind="stable")
        documents = chosen[by_file]
        owner = self._owner[documents]
        apart = (np.diff(documents) != 1) | (np.diff(owner) != 0)
        runs = np.concatenate([[0], np.flatnonzero(apart) + 1, [len(documents)]]).tolist()
        begins, ends = offsets[by_file].tolist(), offsets[by_file + 1].tolist()
        positions = self._rows["content"][documents]
        file: SpillReader | None = None
        try:
            for first, stop in pairwise(runs):
                piece = self._pieces[int(owner[first])]
                if file is None or file.path != piece.path:
                    if file is not None:
                        file.close()
                    file = SpillReader(piece.path)
                places = [data[begins[index] : ends[index]] for index in range(first, stop)]
                file.read(places, piece.run.contents + int(positions[first]))
        finally:
            if file is not None:
                file.close()


def _check(table: Rows, piece: Piece) -> None:
    """Refuse a table that cannot be what the scatter task wrote.

    Raises:
        InputError: it cannot.
    """
    for name in ("content", "id"):
        values = table[name]
        most = piece.run.content_bytes if name == "content" else piece.run.id_bytes
        if int(values[0]) < 0 or int(values[-1]) > most or bool((values[1:] < values[:-1]).any()):
            raise damaged(piece.path)
    keys = table["key"][:-1]
    if bool((keys[1:] < keys[:-1]).any()) or int(table["source"][:-1].max()) >= len(piece.sources):
        raise damaged(piece.path)


def _strings(lengths: Sequence[npt.NDArray[np.int64]], data: Sequence[npt.NDArray[np.uint8]]) -> pa.Array:
    """Return strings that lie end to end as a large_string array."""
    counts = np.concatenate([np.zeros(1, np.int64), *lengths])
    offsets = np.cumsum(counts)
    values = np.concatenate([np.empty(0, np.uint8), *data])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, buffers)


def source_column(names: Sequence[str], order: Sequence[str] | None) -> pa.DictionaryArray:
    """Return the source column of a shard: a dictionary of the names in it, in an order that does not depend on chance.

    Args:
        names: n names.
        order: all names in their order; None takes the alphabet's.
    """
    there = set(names)
    values = sorted(there) if order is None else [name for name in order if name in there]
    index = {name: position for position, name in enumerate(values)}
    indices = np.fromiter((index[name] for name in names), np.int32, len(names))
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(values, pa.string()))


def gather(
    plan: GroupPlan,
    index: int,
    folder: Path,
    options: GatherOptions,
    report: Callable[[int, int], None],
    scratch: Scratch,
) -> GatherRecord:
    """Write the staged shards of one group, and its record.

    Args:
        plan: of the job.
        index: which group.
        folder: the task's folder; it is made.
        options: of the job.
        report: told of documents and content bytes since its last call.
        scratch: memory for the contents.

    Raises:
        InputError: a spill file is damaged.
        OSError: one cannot be read, or a shard cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = Group(plan, index, options.ordering)
    splits: dict[str, tuple[ShardEntry, ...]] = {}
    for number, (split, provenance) in enumerate(options.provenance.items()):
        entries: list[ShardEntry] = []
        for chosen in group.shards(number, options.shard_bytes):
            documents = group.read(chosen, options.sources, scratch)
            path = folder / f"{split}-{len(entries):05d}.arrow"
            entries.append(write_documents(path, documents, provenance, options.compression))
            report(entries[-1].documents, entries[-1].bytes)
        splits[split] = tuple(entries)
    for reason in group.skipped.values():
        report(reason.count, reason.bytes)
    record = GatherRecord(splits=splits, skipped=group.skipped)
    write_gather_record(folder, record)
    return record


def write_documents(
    path: Path, documents: Documents, provenance: Mapping[str, JSON], compression: Compression
) -> ShardEntry:
    """Write a byte shard.

    Args:
        path: the file.
        documents: what it holds.
        provenance: see `write_shard`.
        compression: of the file.

    Raises:
        OSError: it cannot be written.
    """
    return write_shard(
        path,
        kind=ShardKind.BYTES,
        document_ids=documents.document_ids,
        contents=documents.contents,
        sources=documents.sources,
        provenance=provenance,
        compression=compression,
    )
