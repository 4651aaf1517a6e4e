"""datatrove blocks: documents of a source, scattered, gathered and finished into shard directories.

    stage 1   SourceReader, any steps of the user's, SpillWriter     one rank per task
    stage 2   SpillReader, ShardWriter                               any number of ranks, each takes its share
    stage 3   Finisher                                               one rank

They follow datatrove's protocol: `SourceReader` yields ordinary Documents to any block after it, `SpillWriter` takes
those of any block before it, and `SpillReader` yields them in their final order. Between two of ours that follow one
another directly, documents pass in columns.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from blt_data.documents import DocumentBatch
from blt_data.errors import InputError
from blt_data.finishing import finish_job
from blt_data.gather import Group
from blt_data.groups import GroupPlan
from blt_data.jobs import Job, ScatterTask
from blt_data.readers import OpenParquet, read_unit
from blt_data.records import ScatterRecord, StepCount, read_scatter_record, write_scatter_record
from blt_data.scatter import Scatter
from blt_data.scratch import Scratch
from blt_data.skips import ErrorPolicy, OnError, Skips
from blt_data.workdir import working_directory

#: Content bytes of Documents that are put into one batch.
_BATCH_BYTES: Final = 1 << 20


def _silent(source_bytes: int, documents: int, content_bytes: int) -> None:
    """Tell nobody."""


class SourceStream:
    """The documents of one task: an iterable of datatrove Documents that also has them in columns.

    Args:
        task: what to read.
        policy: what becomes of bad input, and the count of what was left out.
        report: told of source bytes.
    """

    def __init__(self, task: ScatterTask, policy: ErrorPolicy, report: Callable[[int, int, int], None]) -> None:
        self.policy = policy
        self._task, self._report = task, report

    def batches(self) -> Iterator[tuple[int, DocumentBatch]]:
        """Yield documents with the ordinal of their unit.

        Raises:
            InputError: a source file is damaged, or holds something that is no document.
            OSError: a source file cannot be read.
        """
        task = self._task
        if task.reading is None:
            raise RuntimeError(f"{task.name} is no task of files")
        with OpenParquet() as opened:
            for unit in task.units:
                for batch in read_unit(unit, task.reading, policy=self.policy, advance=self._advance, opened=opened):
                    yield unit.ordinal, batch

    def _advance(self, amount: int) -> None:
        self._report(amount, 0, 0)

    def __iter__(self) -> Iterator[Document]:
        for _, batch in self.batches():
            names = batch.document_ids.to_pylist()
            texts = batch.contents.cast(pa.large_string()).to_pylist()
            for name, text, row in zip(names, texts, batch.rows.tolist(), strict=True):
                yield Document(
                    text=text, id=name, metadata={"file_path": batch.file, "row": row, "source": batch.source}
                )


class SourceReader(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Read the documents of one task.

    Args:
        tasks: rank to task.
        on_error: what becomes of a bad row or a damaged file.
    """

    type = "📖 - READER"
    name = "blt-data source"

    def __init__(self, tasks: Mapping[int, ScatterTask], on_error: OnError) -> None:
        super().__init__()
        self.tasks = tasks
        self.policy = ErrorPolicy(on_error)
        self.report: Callable[[int, int, int], None] = _silent

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterable[Document]:
        """Return the task's documents in source order, after any that came before.

        Args:
            data: documents of earlier blocks.
            rank: index of the task.
            world_size: number of tasks.
        """
        self.policy.skips.clear()
        stream = SourceStream(self.tasks[rank], self.policy, self.report)
        return stream if not data else (document for part in (data, stream) for document in part)


class StepCounter(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Count documents and bytes between two steps; ours, to be able to say what a step dropped.

    Args:
        before: name of the step before it.
    """

    type = "🔢 - COUNT"
    name = "documents that pass"

    def __init__(self, before: str) -> None:
        super().__init__()
        self.before = before
        self.documents = self.bytes = 0

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield all documents."""
        self.documents = self.bytes = 0
        for document in data or ():
            text = document.text
            self.documents += 1
            # A text without UTF-8 is refused further on.
            self.bytes += len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
            yield document


class SpillWriter(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Scatter the documents of one task; its record, written last, says that it is finished.

    Args:
        tasks: rank to task.
        job: where, and in which order.
        reader: the block whose count of what was left out goes into the record, if it is ours.
        counters: what stands around each step of the user's, in order.
    """

    type = "💽 - WRITER"
    name = "blt-data spill"

    def __init__(
        self,
        tasks: Mapping[int, ScatterTask],
        job: Job,
        *,
        reader: SourceReader | None,
        counters: Sequence[StepCounter] = (),
    ) -> None:
        super().__init__()
        self.tasks, self.job, self.reader, self.counters = tasks, job, reader, counters
        self.report: Callable[[int, int, int], None] = _silent
        self.record: ScatterRecord | None = None
        """Of the last task."""
        self.scratch = Scratch()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write all documents; those that came as Documents are yielded on.

        Args:
            data: the documents.
            rank: index of the task.
            world_size: number of tasks.

        Raises:
            InputError: a text has no UTF-8, or a step took away what says where a document comes from.
            OSError: the spill file cannot be written.
        """
        task = self.tasks[rank]
        self.record = self.job.scattered(task)
        if self.record is not None or self.job.is_complete():
            return
        folder = self.job.scatter_folder(task.key)
        folder.mkdir(parents=True, exist_ok=True)
        with Scatter(
            folder,
            self.job.scatter,
            scratch=self.scratch,
            limit_bytes=task.limit_bytes,
            report=lambda documents, content_bytes: self.report(0, documents, content_bytes),
        ) as scatter:
            if isinstance(data, SourceStream):
                for unit, batch in data.batches():
                    if not scatter.add(batch, unit):
                        break
            else:
                yield from self._take(data or (), _Places(task, self.job.source), scatter)
            skipped = Skips() if self.reader is None else self.reader.policy.skips
            record = scatter.finish(skipped=skipped, steps=self._steps())
        replaced = read_scatter_record(folder)
        write_scatter_record(folder, record)
        if replaced is not None:
            # Of another limit.
            for name in (replaced.spill, f"{replaced.spill}.npy"):
                (folder / name).unlink(missing_ok=True)
        self.record = record
        self.stat_update("documents", value=record.documents)
        self.stat_update("content", value=record.content_bytes, unit="bytes")

    def _take(self, data: Iterable[Document], places: _Places, scatter: Scatter) -> Iterator[Document]:
        pending = _Pending()
        for document in data:
            place = places.of(document)
            content = _content(document)
            if not pending.fits(place) and not pending.flush(scatter):
                return
            pending.add(document.id, content, place)
            yield document
        pending.flush(scatter)

    def _steps(self) -> tuple[StepCount, ...]:
        return tuple(
            StepCount(
                name=after.before,
                documents_in=before.documents,
                bytes_in=before.bytes,
                documents_out=after.documents,
                bytes_out=after.bytes,
            )
            for before, after in pairwise(self.counters)
        )


def _content(document: Document) -> bytes:
    try:
        return bytes(document.text.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"document {document.id!r} has no UTF-8 ({error}); mend or remove it") from error


class _Place(NamedTuple):
    """Where a Document comes from."""

    source: str
    file: str
    unit: int
    """Ordinal of the unit in the job; the rank, of another reader."""
    row: int
    """In the file; 0 if it is not known."""
    order: int
    """Grows from document to document of a unit."""


class _Places:
    """Finds out where in the source a Document comes from.

    Args:
        task: what is read.
        source: what documents of another reader are said to come from, unless they say it themselves.
    """

    def __init__(self, task: ScatterTask, source: str) -> None:
        self._task, self._source = task, source
        self._units: dict[str, tuple[list[int], list[int]]] = {}
        for unit in task.units:
            first_rows, ordinals = self._units.setdefault(unit.file.relative, ([], []))
            first_rows.append(unit.first_row)
            ordinals.append(unit.ordinal)
        self._count = 0

    def of(self, document: Document) -> _Place:
        """Return a document's place.

        Raises:
            InputError: a step took away the metadata that says it.
        """
        metadata = document.metadata
        if self._task.reading is None:
            # Of another reader nothing is known but that it gives the same documents in the same order every time.
            self._count += 1
            path = str(metadata.get("file_path", ""))
            source = str(metadata.get("source", self._source))
            return _Place(source=source, file=path, unit=self._task.index, row=0, order=self._count)
        try:
            path, row, source = metadata["file_path"], metadata["row"], metadata["source"]
            first_rows, ordinals = self._units[path]
        except KeyError as error:
            raise InputError(
                f"document {document.id!r} lacks {error} in its metadata, or has another's; "
                "use steps that keep the metadata file_path, row and source"
            ) from error
        unit = ordinals[bisect_right(first_rows, row - 1) - 1]
        return _Place(source=source, file=path, unit=unit, row=row, order=row)


@dataclass(slots=True)
class _Pending:
    """Documents that will be one batch."""

    place: _Place | None = None
    size: int = 0
    documents: list[tuple[str, bytes, int, int]] = field(default_factory=list)

    def add(self, document_id: str, content: bytes, place: _Place) -> None:
        self.place = place
        self.size += len(content)
        self.documents.append((document_id, content, place.row, place.order))

    def flush(self, scatter: Scatter) -> bool:
        """Hand the documents on; return whether more are wanted."""
        if self.place is None:
            return True
        ids, contents, rows, order = zip(*self.documents, strict=True)
        batch = DocumentBatch(
            source=self.place.source,
            file=self.place.file,
            rows=np.array(rows, np.int64),
            document_ids=pa.array(ids, pa.string()),
            contents=pa.array(contents, pa.large_binary()),
        )
        unit = self.place.unit
        self.place, self.size, self.documents = None, 0, []
        return scatter.add(batch, unit, np.array(order, np.int64))

    def fits(self, place: _Place) -> bool:
        """Return whether a document of that place may be in the same batch."""
        return self.place is None or (self.place[:3] == place[:3] and self.size < _BATCH_BYTES)


class GroupStream:
    """Groups of documents: an iterable of datatrove Documents in their final order.

    Args:
        job: of the groups.
        plan: of the job.
        groups: indices of the groups.
    """

    def __init__(self, job: Job, plan: GroupPlan | None, groups: Sequence[int]) -> None:
        self.job, self.plan, self.groups = job, plan, groups

    def __iter__(self) -> Iterator[Document]:
        if self.plan is None:
            return
        scratch = Scratch()
        for index in self.groups:
            group = Group(self.plan, index, self.job.gather.ordering)
            for number, split in enumerate(self.job.scatter.splits):
                for chosen in group.shards(number, self.job.gather.shard_bytes):
                    documents = group.read(chosen, self.job.gather.sources, scratch)
                    columns = (documents.document_ids, documents.contents, documents.sources)
                    for name, content, source in zip(*(column.to_pylist() for column in columns), strict=True):
                        yield Document(text=content.decode(), id=name, metadata={"source": source, "split": split})


class SpillReader(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Read the documents of a share of the groups, in their final order.

    Args:
        tasks: the scatter tasks, in source order.
        job: of the tasks.
    """

    type = "📖 - READER"
    name = "blt-data spill"

    def __init__(self, tasks: Sequence[ScatterTask], job: Job) -> None:
        super().__init__()
        self.tasks, self.job = tasks, job

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> GroupStream:
        """Return the documents of the `rank`-th of `world_size` shares.

        Args:
            data: ignored; this block is the first of its stage.
            rank: which share.
            world_size: number of shares.

        Raises:
            InputError: the first stage is not finished.
            OSError: its files cannot be read.
        """
        if self.job.is_complete():
            return GroupStream(self.job, None, ())
        plan = self.job.plan_from_disk(self.tasks)
        groups = range(rank * len(plan) // world_size, (rank + 1) * len(plan) // world_size)
        return GroupStream(self.job, plan, groups)


class ShardWriter(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Write one staged shard (or more, of a large cell) per split from each group."""

    type = "💽 - WRITER"
    name = "blt-data shards"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write the groups that have no record yet.

        Args:
            data: what `SpillReader` returned.
            rank: ignored.
            world_size: ignored.

        Raises:
            InputError: something stands between it and `SpillReader`, or a spill file is damaged.
            OSError: a spill file cannot be read, or a shard cannot be written.
        """
        if not isinstance(data, GroupStream):
            raise InputError(
                "ShardWriter follows SpillReader directly; put your steps between SourceReader and SpillWriter"
            )
        if data.plan is not None:
            scratch = Scratch()
            for group in data.groups:
                if data.job.gathered(data.plan, group) is None:
                    data.job.gather_group(data.plan, group, self._count, scratch)
        yield from ()

    def _count(self, documents: int, content_bytes: int) -> None:
        self.stat_update("documents", value=documents)
        self.stat_update("content", value=content_bytes, unit="bytes")


class Finisher(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Give the shards their names, write the manifests and remove what is no longer needed.

    Args:
        tasks: the scatter tasks, in source order.
        job: of the tasks.
    """

    type = "🏁 - FINISH"
    name = "blt-data manifest"

    def __init__(self, tasks: Sequence[ScatterTask], job: Job) -> None:
        super().__init__()
        self.tasks, self.job = tasks, job

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Finish the job, unless that is done.

        Args:
            data: ignored.
            rank: ignored.
            world_size: must be 1.

        Raises:
            InputError: the stages before are not finished, or a split has no document.
            OSError: a shard cannot be written.
        """
        if not self.job.is_complete():
            with working_directory(self.job.output):
                finish_job(self.job, self.job.plan_from_disk(self.tasks))
        yield from ()


def scatter_blocks(
    tasks: Mapping[int, ScatterTask],
    job: Job,
    *,
    readers: Sequence[PipelineStep] | None = None,
    steps: Sequence[PipelineStep] = (),
) -> list[PipelineStep]:
    """Return the blocks of the first stage.

    Args:
        tasks: rank to task.
        job: of the tasks.
        readers: blocks that give the documents; None reads the tasks' units.
        steps: what the user puts between reading and writing.
    """
    reader = SourceReader(tasks, job.on_error) if readers is None else None
    blocks = [reader] if readers is None else [*readers]
    counters = []
    if steps:
        counters.append(StepCounter(""))
        blocks.append(counters[0])
    for step in steps:
        counters.append(StepCounter(str(getattr(step, "name", None) or step_name(step))))
        blocks += [step, counters[-1]]
    return [*blocks, SpillWriter(tasks, job, reader=reader, counters=counters)]


def step_name(step: object) -> str:
    """Return what messages call a step: its class, or its function."""
    return str(getattr(step, "__qualname__", None) or type(step).__qualname__)


def run_blocks(blocks: Sequence[PipelineStep], rank: int, world_size: int) -> None:
    """Run blocks for one rank, as datatrove's executors do.

    Args:
        blocks: of one stage.
        rank: index of the task.
        world_size: number of tasks.
    """
    data = None
    for block in blocks:
        data = block(data, rank, world_size) if callable(block) else block
    deque(data or (), maxlen=0)
