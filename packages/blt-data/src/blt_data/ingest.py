"""`prepare`: documents of one or several sources into shard directories, resumable and reproducible.

    scatter   tasks read the source and spill it, sorted into cells         (stages.py, in parallel)
    gather    tasks put consecutive cells together into staged shards       (stages.py, in parallel)
    finish    the staged shards get their names, the manifest is written    (finishing.py, in this process)

A run that is killed leaves OUTPUT/.work (see jobs.py); the same command takes over every task that has its record, and
finishes anew.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from blt_data.config import DEFAULT_SHARD_BYTES, ForeignReader, PrepareConfig
from blt_data.cpus import available_cpus
from blt_data.errors import InputError
from blt_data.executors import Executor, LocalExecutor, TaskFailure
from blt_data.finishing import finish_job, steps_of
from blt_data.groups import GroupPlan
from blt_data.jobs import WORK_NAME, ScatterTask
from blt_data.limits import Waves
from blt_data.records import ScatterRecord, StepCount
from blt_data.shards import JSON, MANIFEST_NAME, Manifest, ShardDirectory
from blt_data.splits import HOLDOUT, TRAIN, WHOLE, split_directory
from blt_data.units import format_bytes
from blt_data.workdir import discard_other_groups, discard_others, finished, working_directory

if TYPE_CHECKING:
    from blt_data.planning import PlannedJob
    from blt_data.stages import Steps

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "PrepareConfig",
    "PrepareResult",
    "PrepareStart",
    "StageStart",
    "TasksFailedError",
    "prepare",
]

#: Bytes to read for which starting another process (about a second) is worth its time.
_WORKER_BYTES: Final = 100_000_000

#: Takes source bytes read, documents and content bytes written since its last call.
ProgressSink = Callable[[int, int, int], None]


class TasksFailedError(InputError):
    """Tasks were given up; the others are finished, and will not be done again.

    Args:
        failures: what was given up.
        tasks: how many tasks there were.
    """

    def __init__(self, failures: Sequence[TaskFailure], tasks: int) -> None:
        self.failures = tuple(failures)
        self.tasks = tasks
        first = failures[0]
        # Bad input is told in a sentence that names its file itself.
        message = first.message if first.attempts == 1 else str(first)
        if len(failures) > 1:
            message = f"{len(failures)} of {tasks} tasks failed, the first one because: {message}"
        super().__init__(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareStart:
    """What is known when the work begins."""

    files: int
    """Source files to read."""
    source_bytes: int
    """Bytes to read, as near as can be told beforehand."""
    tasks: int
    tasks_resumed: int
    """Tasks taken over from a run that did not end."""
    tasks_discarded: int
    """Tasks of an unfinished run with other parameters, other source files or other package versions."""
    workers: int
    """Tasks at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStart:
    """What is known when a stage begins."""

    description: str
    """What is being done, in a few words."""
    noun: str
    """What its tasks are called, in the plural."""
    tasks: int
    tasks_done: int
    """Tasks that an earlier run has done."""
    bytes: int
    """Bytes that the stage will tell of."""
    bytes_done: int
    """Those of the tasks that an earlier run has done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listener:
    """Whom a run tells how far it is; all is called in this process."""

    on_start: Callable[[PrepareStart], None] | None = None
    """Once before reading, unless the output is already complete."""
    on_stage: Callable[[StageStart], None] | None = None
    """Once at the beginning of each stage."""
    on_progress: ProgressSink | None = None
    """Now and then; the first number is of the bytes that the stage said."""
    on_task: Callable[[], None] | None = None
    """After each task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareResult:
    """What a run left."""

    manifests: Mapping[Path, Manifest]
    """Shard directory to its manifest: the output itself, or its `train` and `holdout`."""
    already_complete: bool
    """The output was there already, prepared with the same parameters."""
    seconds: float = 0.0
    """How long it took."""
    steps: tuple[StepCount, ...] = ()
    """What the steps between reading and writing did."""
    shortages: tuple[str, ...] = ()
    """For each source that had less than its limit or share, one sentence."""
    stats: Any = None
    """datatrove's `PipelineStats` of those steps, or None."""


def prepare(
    config: PrepareConfig,
    *,
    executor: Executor | None = None,
    listener: Listener | None = None,
    steps: Sequence[Any] = (),
    reader: ForeignReader | None = None,
) -> PrepareResult:
    """Write the documents of a source to a shard directory.

    Args:
        config: what and where.
        executor: where the tasks run; None takes processes of this machine, as many as the config says.
        listener: is told how far it is.
        steps: datatrove blocks through which the documents pass on their way.
        reader: what gives the documents in place of our reader.

    Raises:
        TasksFailedError: tasks failed, and the others are finished.
        InputError: bad input, or the output holds something else.
        OSError: input cannot be read or output cannot be written.
    """
    started = time.monotonic()
    listener = listener or Listener()
    _require_datatrove()
    # The light core (reading shards) works without what these need.
    from blt_data.planning import plan_job
    from blt_data.stages import Steps

    planned = plan_job(
        config,
        steps=steps,
        reader=reader,
        workers=executor.workers if executor is not None else config.workers or available_cpus(),
        on_one_machine=executor is None or executor.on_one_machine,
    )
    output = Path(config.output)
    if manifests := finished(output):
        check_same(output, next(iter(manifests.values())).provenance, planned.provenance)
        shutil.rmtree(output / WORK_NAME, ignore_errors=True)
        return PrepareResult(manifests=manifests, already_complete=True)
    with working_directory(output):
        run = _Run(
            planned,
            Steps(readers=None if reader is None else reader.blocks, steps=tuple(steps)),
            workers=_workers(config, planned),
            executor=executor,
            listener=listener,
        )
        result = run.do(output)
    return replace(result, seconds=time.monotonic() - started)


def _require_datatrove() -> None:
    """Import what only preparing needs, before anything is written.

    Raises:
        InputError: it is not installed.
    """
    try:
        import_module("blt_data.stages")
    except ModuleNotFoundError as error:
        raise InputError(
            f"prepare needs a package that is not installed ({error.name}); pip install 'blt-data[prepare]'"
        ) from error


def _workers(config: PrepareConfig, planned: PlannedJob) -> int:
    if config.workers is not None:
        return planned.memory.workers
    weight = sum(task.weight for task in planned.tasks)
    return min(planned.memory.workers, 1 + weight // _WORKER_BYTES)


class _Run:
    """One run of a job, in its work directory."""

    def __init__(
        self, planned: PlannedJob, steps: Steps, *, workers: int, executor: Executor | None, listener: Listener
    ) -> None:
        self._job, self._planned, self._steps = planned.job, planned, steps
        self._workers, self._executor, self._listener = workers, executor, listener
        self._records: dict[int, ScatterRecord] = {}
        self._shortages: tuple[str, ...] = ()

    def do(self, output: Path) -> PrepareResult:
        """Do what an earlier run has not done, and finish."""
        from blt_data.stages import total_stats

        job, tasks = self._job, self._planned.tasks
        discarded = discard_others(job, {task.key for task in tasks})
        done = [task for task in tasks if job.scattered(task) is not None]
        if self._listener.on_start is not None:
            self._listener.on_start(
                PrepareStart(
                    files=self._planned.files,
                    source_bytes=sum(task.weight for task in tasks),
                    tasks=len(tasks),
                    tasks_resumed=len(done),
                    tasks_discarded=discarded,
                    workers=self._workers,
                )
            )
        chosen = self._scatter()
        plan = job.plan(self._records, chosen)
        discard_other_groups(job, job.gather_key(plan))
        self._gather(plan)
        manifests = finish_job(job, plan)
        return PrepareResult(
            # Under the path that the caller knows.
            manifests={output / path.relative_to(job.output): manifest for path, manifest in manifests.items()},
            already_complete=False,
            steps=steps_of(plan),
            shortages=self._shortages,
            stats=total_stats(job, chosen),
        )

    def _scatter(self) -> list[ScatterTask]:
        """Read the source; return the tasks that count."""
        waves = Waves(self._planned.tasks, self._planned.limits)
        told = False
        while wave := waves.next():
            missing = []
            for task in wave:
                record = self._job.scattered(task)
                if record is None:
                    missing.append(task)
                else:
                    self._records[task.index] = record
            if not told:
                self._tell_scatter(wave, missing)
                told = True
            self._run_scatter(missing)
            waves.take(self._records)
        names = {task.source: task.reading.source for task in self._planned.tasks if task.reading is not None}
        self._shortages = tuple(
            f"{names[source]} holds {format_bytes(given)}, less than its limit or share of "
            f"{format_bytes(self._planned.limits.of_source[source])}; nothing is repeated to make up for it"
            for source, given in waves.shortages().items()
        )
        return waves.chosen

    def _tell_scatter(self, wave: Sequence[ScatterTask], missing: Sequence[ScatterTask]) -> None:
        if self._listener.on_stage is not None:
            total, left = (sum(task.weight for task in tasks) for tasks in (wave, missing))
            self._listener.on_stage(
                StageStart(
                    description="reading",
                    noun="parts",
                    tasks=len(wave),
                    tasks_done=len(wave) - len(missing),
                    bytes=total,
                    bytes_done=total - left,
                )
            )

    def _run_scatter(self, tasks: Sequence[ScatterTask]) -> None:
        from blt_data.stages import set_up_scatter

        def keep(index: int, record: ScatterRecord) -> None:
            self._records[tasks[index].index] = record
            self._tell_task()

        with self._executors(self._workers) as executor:
            failures = executor.run(
                partial(set_up_scatter, self._job, self._steps.pack(), len(self._planned.tasks)),
                tasks,
                names=[task.name for task in tasks],
                on_progress=self._listener.on_progress,
                on_result=keep,
                shared_directory=self._job.work,
            )
        if failures:
            raise TasksFailedError(failures, len(tasks))

    def _gather(self, plan: GroupPlan) -> None:
        from blt_data.stages import set_up_gather

        groups = [group for group in range(len(plan)) if self._job.gathered(plan, group) is None]
        if self._listener.on_stage is not None:
            total, left = int(plan.content_bytes.sum()), int(plan.content_bytes[groups].sum())
            self._listener.on_stage(
                StageStart(
                    description="writing",
                    noun="shards",
                    tasks=len(plan),
                    tasks_done=len(plan) - len(groups),
                    bytes=total,
                    bytes_done=total - left,
                )
            )
        largest = [int(column.max(initial=0)) for column in (plan.content_bytes, plan.documents)]
        with self._executors(min(self._workers, self._planned.memory.gather_workers(*largest))) as executor:
            failures = executor.run(
                partial(set_up_gather, self._job, plan),
                groups,
                names=[f"shard {group + 1} of {len(plan)}" for group in groups],
                on_progress=self._tell_written,
                on_result=lambda index, record: self._tell_task(),
                shared_directory=self._job.work,
            )
        if failures:
            raise TasksFailedError(failures, len(groups))

    def _tell_written(self, source_bytes: int, documents: int, content_bytes: int) -> None:
        if self._listener.on_progress is not None:
            self._listener.on_progress(content_bytes, documents, content_bytes)

    def _tell_task(self) -> None:
        if self._listener.on_task is not None:
            self._listener.on_task()

    @contextmanager
    def _executors(self, workers: int) -> Iterator[Executor]:
        """Give the user's executor, which stays open, or one of this machine's processes."""
        if self._executor is not None:
            yield self._executor
        else:
            with LocalExecutor(workers) as executor:
                yield executor


def check_same(output: Path, there: Mapping[str, JSON], here: Mapping[str, JSON]) -> None:
    """Refuse a complete output of other parameters; other package versions are no reason to do it again.

    Args:
        output: the output.
        there: the provenance of what is there.
        here: the provenance of what is wanted.

    Raises:
        InputError: they differ, or a file of the output is not there.
    """
    parts = ("command", "source", "sources", "reader", "options", "steps")
    differences = [
        f"{name} is {_brief(old)} there, {_brief(new)} here"
        for part in parts
        for name, old, new in _pairs(part, there.get(part), here.get(part))
        if old != new
    ]
    if differences:
        raise InputError(
            f"{output}: is already complete with other parameters ({'; '.join(differences)}); "
            "name another --output or delete it"
        )
    for split in (WHOLE,) if (output / MANIFEST_NAME).exists() else (TRAIN, HOLDOUT):
        ShardDirectory.open(split_directory(output, split))


def _pairs(part: str, old: JSON, new: JSON) -> Iterator[tuple[str, JSON, JSON]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield key, old.get(key), new.get(key)
    else:
        yield part, old, new


def _brief(value: JSON) -> str:
    """Return a value for a message: long checksums shortened, None as the absence it is."""
    if value is None:
        return "not given"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
