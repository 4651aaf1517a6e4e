"""Staged shards: what one task writes in a folder of its own, and the record that says the task is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from blt_data.shards import JSON, ShardEntry, ShardKind, write_shard
from blt_data.shards.files import atomic_file

RECORD_NAME: Final = "record.json"

#: Documents of few bytes or none must not pile up in memory either.
MAX_DOCUMENTS: Final = 1_000_000

_REPORT_BYTES: Final = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRecord:
    """What a finished task wrote."""

    splits: Mapping[str, tuple[ShardEntry, ...]]
    """Split to its shards, in order."""
    skipped: Mapping[str, int]
    """Reason to number of documents left out."""


def start_task(folder: Path) -> None:
    """Make a task's folder, without anything an earlier attempt left there.

    Args:
        folder: the task's folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_record(folder: Path, record: TaskRecord) -> None:
    """Declare a task finished.

    Args:
        folder: the task's folder.
        record: what is in it.
    """
    value = {
        "splits": {split: [asdict(entry) for entry in entries] for split, entries in record.splits.items()},
        "skipped": dict(record.skipped),
    }
    with atomic_file(folder / RECORD_NAME) as file:
        file.write(json.dumps(value).encode())


def read_record(folder: Path) -> TaskRecord | None:
    """Return the record of a finished task, or None if the task is not finished or lacks a shard.

    Args:
        folder: the task's folder.
    """
    try:
        value = json.loads((folder / RECORD_NAME).read_bytes())
    except FileNotFoundError:
        return None
    splits = {split: tuple(ShardEntry(**entry) for entry in entries) for split, entries in value["splits"].items()}
    for entry in (entry for entries in splits.values() for entry in entries):
        path = folder / entry.name
        if not path.exists() or path.stat().st_size != entry.file_bytes:
            return None
    return TaskRecord(splits=splits, skipped=value["skipped"])


class StagedShards:
    """Collects the documents of one split and writes a shard whenever one is full.

    Args:
        folder: the task's folder.
        split: the split's name; shards are called `<split>-00000.arrow` and so on.
        source_name: the `source` of every document.
        shard_bytes: content bytes at which a shard is full; a larger document has a shard of its own.
        provenance: what the shards say of where they come from.
        pool: writes full shards while the next one is collected; at most one of this split at a time.
        report: told of documents and content bytes since its last call.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        source_name: str,
        shard_bytes: int,
        provenance: Mapping[str, JSON],
        pool: ThreadPoolExecutor,
        report: Callable[[int, int], None],
    ) -> None:
        self._folder, self._split = folder, split
        self._source_name, self._shard_bytes, self._provenance = source_name, shard_bytes, provenance
        self._pool, self._report = pool, report
        self._ids: list[str] = []
        self._contents: list[bytes] = []
        self._bytes = 0
        self._reported = (0, 0)
        self._writing: Future[ShardEntry] | None = None
        self._entries: list[ShardEntry] = []

    def add(self, document_id: str, content: bytes) -> None:
        """Add a document, first writing a shard if it would become too large.

        Raises:
            OSError: the shard cannot be written.
        """
        if self._ids and (self._bytes + len(content) > self._shard_bytes or len(self._ids) == MAX_DOCUMENTS):
            self._write()
        self._ids.append(document_id)
        self._contents.append(content)
        self._bytes += len(content)
        if self._bytes - self._reported[1] >= _REPORT_BYTES:
            self._tell()

    def finish(self) -> tuple[ShardEntry, ...]:
        """Write what is left and return all shards' entries.

        Raises:
            OSError: the shard cannot be written.
        """
        if self._ids:
            self._write()
        self._wait()
        return tuple(self._entries)

    def _tell(self) -> None:
        documents, content_bytes = self._reported
        self._report(len(self._ids) - documents, self._bytes - content_bytes)
        self._reported = (len(self._ids), self._bytes)

    def _write(self) -> None:
        self._tell()
        self._wait()
        path = self._folder / f"{self._split}-{len(self._entries):05d}.arrow"
        # Hashing, writing and waiting for the disk release the GIL, so that reading goes on meanwhile.
        self._writing = self._pool.submit(
            write_byte_shard,
            path,
            self._ids,
            self._contents,
            source_name=self._source_name,
            provenance=self._provenance,
        )
        self._ids, self._contents, self._bytes, self._reported = [], [], 0, (0, 0)

    def _wait(self) -> None:
        if self._writing is not None:
            self._entries.append(self._writing.result())
            self._writing = None


def write_byte_shard(
    path: Path,
    document_ids: Sequence[str] | pa.Array,
    contents: Sequence[bytes] | pa.Array,
    *,
    source_name: str,
    provenance: Mapping[str, JSON],
) -> ShardEntry:
    """Write a byte shard whose documents all have one source.

    Args:
        path: the file.
        document_ids: n document ids.
        contents: n documents.
        source_name: name of the source.
        provenance: see `write_shard`.
    """
    if not isinstance(contents, pa.Array):
        contents = _joined(contents)
    sources = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(contents), np.int32)), pa.array([source_name]))
    return write_shard(
        path,
        kind=ShardKind.BYTES,
        document_ids=document_ids,
        contents=contents,
        sources=sources,
        provenance=provenance,
    )


def _joined(contents: Sequence[bytes]) -> pa.Array:
    """Return documents as one Arrow array, with a single copy of their bytes."""
    offsets = np.zeros(len(contents) + 1, np.int64)
    np.cumsum([len(content) for content in contents], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(contents))]
    return pa.Array.from_buffers(pa.large_binary(), len(contents), buffers)
