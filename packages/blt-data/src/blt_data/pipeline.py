"""datatrove blocks that make shards of documents.

They follow datatrove's protocol, so that any of its filters can stand between `SourceReader` and `ShardWriter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pyarrow as pa
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from blt_data.errors import InputError
from blt_data.plan import Task
from blt_data.readers import read_unit
from blt_data.shards import JSON
from blt_data.skips import ErrorPolicy
from blt_data.splits import split_of
from blt_data.staging import StagedShards, TaskRecord, start_task, write_record


class Reporter:
    """Where the blocks of this process tell how far they are; the executor gives it a sink."""

    sink: Callable[[int, int, int], None] | None = None
    """Takes source bytes read, documents written and content bytes written since its last call."""

    def __call__(self, source_bytes: int, documents: int, content_bytes: int) -> None:
        """Tell what has been done since the last call."""
        if self.sink is not None:
            self.sink(source_bytes, documents, content_bytes)


report: Final = Reporter()


class SourceReader(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Read the documents of one task.

    Args:
        tasks: one per rank.
    """

    type = "📖 - READER"
    name = "blt-data source"

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.tasks = tasks
        self.policy = ErrorPolicy()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the task's documents in source order, after any that came before.

        Args:
            data: documents of earlier blocks.
            rank: index of the task.
            world_size: number of tasks.

        Raises:
            InputError: a source file is damaged, or holds something that is no document.
        """
        self.policy = ErrorPolicy()
        if data:
            yield from data
        task = self.tasks[rank]
        for unit in task.units:
            for batch in read_unit(unit, task.reading, policy=self.policy, advance=lambda amount: report(amount, 0, 0)):
                names, texts = batch.document_ids.to_pylist(), batch.contents.cast(pa.large_string()).to_pylist()
                for name, text, row in zip(names, texts, batch.rows.tolist(), strict=True):
                    metadata = {"file_path": batch.file, "row": row, "source": batch.source}
                    yield Document(text=text, id=name, metadata=metadata)


class ByteLimit(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Let the first documents pass, whole, as long as their UTF-8 does not exceed a number of bytes.

    Args:
        limit_bytes: the most that passes.
    """

    type = "🔻 - FILTER"
    name = "byte limit"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield documents up to the first that would exceed the limit.

        Raises:
            InputError: that is the very first one.
        """
        total = 0
        for passed, document in enumerate(data or ()):
            size = len(document.text) if document.text.isascii() else len(document.text.encode())
            total += size
            if total > self.limit_bytes:
                if not passed:
                    raise InputError(
                        f"the first document, {document.id!r}, has {size:,} bytes, more than --limit-bytes "
                        f"{self.limit_bytes:,}; raise the limit"
                    )
                return
            yield document


class ShardWriter(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Write documents to staged shards in one folder per task.

    The task's record, written last, lists them; a task without a record is done again from its start.

    Args:
        folders: each rank's folder.
        reader: the block whose count of skipped documents goes into the record.
        source_name: the `source` of every document.
        shard_bytes: content bytes at which a shard is full; a larger document has a shard of its own.
        provenance: split to what its shards say of where they come from.
        holdout_fraction: share of the documents that the split `holdout` gets, or None for one split of all.
    """

    type = "💽 - WRITER"
    name = "blt-data shards"

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        reader: SourceReader,
        source_name: str,
        shard_bytes: int,
        provenance: Mapping[str, Mapping[str, JSON]],
        holdout_fraction: float | None,
    ) -> None:
        super().__init__()
        self.folders = folders
        self.reader = reader
        self.source_name = source_name
        self.shard_bytes = shard_bytes
        self.provenance = provenance
        self.holdout_fraction = holdout_fraction

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write all documents, yielding each on.

        Args:
            data: the documents.
            rank: index of the task.
            world_size: number of tasks.

        Raises:
            InputError: a text has no UTF-8.
            OSError: a shard cannot be written.
        """
        folder = self.folders[rank]
        start_task(folder)
        with ThreadPoolExecutor(max_workers=1) as pool:
            splits = {
                split: StagedShards(
                    folder,
                    split,
                    source_name=self.source_name,
                    shard_bytes=self.shard_bytes,
                    provenance=provenance,
                    pool=pool,
                    report=lambda documents, content_bytes: report(0, documents, content_bytes),
                )
                for split, provenance in self.provenance.items()
            }
            for document in data or ():
                try:
                    content = document.text.encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"document {document.id!r} has no UTF-8 ({error}); mend or remove it") from error
                splits[split_of(document.id, self.holdout_fraction)].add(document.id, content)
                yield document
            entries = {split: staged.finish() for split, staged in splits.items()}
        write_record(
            folder,
            TaskRecord(
                splits=entries, skipped={reason: skipped.count for reason, skipped in self.reader.policy.skips.items()}
            ),
        )
