"""`build_pipeline`: a job as three lists of datatrove blocks, with any blocks of the user's in between.

    from datatrove.pipeline.filters import GopherQualityFilter
    from blt_data import build_pipeline

    pipeline = build_pipeline("fineweb-edu/sample-10BT", "data/bytes", steps=[GopherQualityFilter()])
    pipeline.run()                      # here, with this machine's processes

or, stage by stage, on any of datatrove's executors:

    first = SlurmPipelineExecutor(pipeline.scatter, tasks=pipeline.scatter_tasks, …)
    second = SlurmPipelineExecutor(pipeline.gather, tasks=pipeline.gather_tasks, depends=first, …)
    SlurmPipelineExecutor(pipeline.finish, tasks=1, depends=second, …).run()
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from datatrove.pipeline.base import PipelineStep

from blt_data.config import ForeignReader, PrepareConfig
from blt_data.errors import InputError
from blt_data.executors import Executor
from blt_data.ingest import Listener, PrepareResult, check_same, prepare
from blt_data.pipeline import Finisher, ShardWriter, SpillReader, scatter_blocks
from blt_data.planning import PlannedJob, plan_job
from blt_data.recipe import Recipe
from blt_data.workdir import check_usable, finished

if TYPE_CHECKING:
    from blt_data.executors.slurm import Stage

#: Ranks of the second stage at most, unless told otherwise; a rank with nothing to do ends at once.
_MOST_RANKS: Final = 256


class Pipeline:
    """A job in three stages of datatrove blocks; made by `build_pipeline`.

    Each stage may run on an executor of its own, after the one before it has ended. Ranks that have been done are
    recognised by what they left in the output, so that a stage may simply be run again.
    """

    def __init__(
        self, config: PrepareConfig, steps: Sequence[Any], reader: ForeignReader | None, gather_tasks: int | None
    ) -> None:
        self.config = config
        self.steps = tuple(steps)
        self._reader, self._ranks = reader, gather_tasks

    @cached_property
    def _planned(self) -> PlannedJob:
        planned = plan_job(self.config, steps=self.steps, reader=self._reader, on_one_machine=False)
        if planned.limits.any:
            raise InputError(
                "where the bytes of a limit end is only known while reading, so a limit needs the run() of the "
                "pipeline; or leave out the limit"
            )
        output = Path(self.config.output)
        if manifests := finished(output):
            check_same(output, next(iter(manifests.values())).provenance, planned.provenance)
        else:
            check_usable(output)
        return planned

    @property
    def scatter(self) -> list[PipelineStep]:
        """Blocks of the first stage: reading, the user's steps, spilling.

        Raises:
            InputError: bad input, or there is a byte limit.
            OSError: a source cannot be listed.
        """
        planned = self._planned
        readers = None if self._reader is None else self._reader.blocks
        return scatter_blocks(dict(enumerate(planned.tasks)), planned.job, readers=readers, steps=self.steps)

    @property
    def scatter_tasks(self) -> int:
        """Tasks of the first stage."""
        return len(self._planned.tasks)

    @property
    def gather(self) -> list[PipelineStep]:
        """Blocks of the second stage: shards out of what the first one spilled."""
        return [SpillReader(self._planned.tasks, self._planned.job), ShardWriter()]

    @property
    def gather_tasks(self) -> int:
        """Tasks of the second stage; they share the shards, of which there may be more or fewer."""
        if self._ranks is not None:
            return self._ranks
        expected = sum(task.expected_bytes for task in self._planned.tasks)
        if self._reader is not None:
            expected = self._reader.expected_bytes
        return max(1, min(_MOST_RANKS, expected // self.config.shard_bytes))

    @property
    def finish(self) -> list[PipelineStep]:
        """Blocks of the third stage, which is one task: names and manifests."""
        return [Finisher(self._planned.tasks, self._planned.job)]

    def slurm_stages(self) -> list[Stage]:
        """Return the stages as `blt_data.executors.slurm.submit` takes them."""
        from blt_data.executors.slurm import Stage

        job, tasks = self._planned.job, self._planned.tasks
        return [
            Stage(
                name="scatter",
                blocks=self.scatter,
                ranks=len(tasks),
                done=lambda rank: job.is_complete() or job.scattered(tasks[rank]) is not None,
            ),
            # Which shards there are is known only when all is scattered.
            Stage(name="gather", blocks=self.gather, ranks=self.gather_tasks, done=lambda rank: job.is_complete()),
            Stage(name="finish", blocks=self.finish, ranks=1, done=lambda rank: job.is_complete()),
        ]

    def run(self, *, executor: Executor | None = None, listener: Listener | None = None) -> PrepareResult:
        """Do all stages.

        Args:
            executor: where the tasks run; None takes processes of this machine, as many as `workers` says.
            listener: is told how far it is.

        Returns:
            What was written, and what each step did.

        Raises:
            TasksFailedError: tasks failed, and the others are finished.
            InputError: bad input, or the output holds something else.
            OSError: input cannot be read or output cannot be written.
        """
        return prepare(self.config, executor=executor, listener=listener, steps=self.steps, reader=self._reader)


def build_pipeline(
    source: str | os.PathLike[str] | Recipe | PipelineStep | Sequence[PipelineStep],
    output: str | os.PathLike[str],
    *,
    steps: Sequence[Any] = (),
    tasks: int | None = None,
    expected_bytes: int | None = None,
    gather_tasks: int | None = None,
    **options: Any,
) -> Pipeline:
    """Return a job as a pipeline of datatrove blocks.

    Args:
        source: what `blt-data prepare --source` takes, or a recipe; or a datatrove reader, or a list of blocks that
            begins with one.
        output: directory to make.
        steps: datatrove blocks (filters, formatters, any that take and yield Documents) between reading and writing.
            They see Documents with the metadata `file_path`, `row` and `source`, and must keep these. What they are is
            part of the provenance; what they drop is counted in the manifest.
        tasks: ranks of the first stage; of a datatrove reader only, and needed there.
        expected_bytes: of a datatrove reader only: bytes of all its documents, roughly.
        gather_tasks: ranks of the second stage; None takes as many as shards are expected, 256 at most.
        options: any other field of `PrepareConfig`: `shuffle_seed`, `deduplicate`, `shard_bytes`, …

    Returns:
        The pipeline; nothing is read before one of its stages is asked for or it is run.

    Raises:
        InputError: an option does not fit.
    """
    known = PrepareConfig.__slots__
    unknown = [name for name in options if name not in known or name in ("source", "recipe", "output")]
    if unknown:
        raise InputError(f"there is no option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if isinstance(source, Recipe):
        return Pipeline(PrepareConfig(recipe=source, output=output, **options), steps, None, gather_tasks)
    if isinstance(source, str | os.PathLike):
        if tasks is not None or expected_bytes is not None:
            raise InputError("tasks and expected_bytes are of a datatrove reader; this source is cut by itself")
        return Pipeline(PrepareConfig(source=os.fspath(source), output=output, **options), steps, None, gather_tasks)
    if tasks is None or tasks < 1:
        raise InputError("a datatrove reader does not say how many tasks share its files; give tasks=…")
    blocks = (source,) if isinstance(source, PipelineStep) else tuple(source)
    size = {} if expected_bytes is None else {"expected_bytes": expected_bytes}
    reader = ForeignReader(blocks=blocks, tasks=tasks, **size)
    name = str(options.pop("source_name", None) or "documents")
    config = PrepareConfig(source=name, output=output, **options)
    return Pipeline(config, steps, reader, gather_tasks)
