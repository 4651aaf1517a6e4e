"""The stages of a job as lists of tasks for an executor: what a worker sets up, and what it does with each task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

from blt_data.executors import Report, TaskFunction
from blt_data.groups import GroupPlan
from blt_data.jobs import Job, ScatterTask
from blt_data.pipeline import SourceReader, SpillWriter, run_blocks, scatter_blocks
from blt_data.records import STATS_NAME, GatherRecord, ScatterRecord
from blt_data.scratch import Scratch
from blt_data.shards.files import atomic_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """Blocks of the user's."""

    readers: tuple[Any, ...] | None = None
    """What gives the documents, if it is not our reader."""
    steps: tuple[Any, ...] = ()
    """What stands between reading and writing."""

    def pack(self) -> bytes | None:
        """Return the blocks in a form that travels to workers, lambdas and all; None if there are none."""
        if self.readers is None and not self.steps:
            return None
        # datatrove's own choice for sending blocks to its workers.
        import dill  # type: ignore[import-untyped]

        return bytes(dill.dumps((self.readers, self.steps), recurse=True))


def _unpack(packed: bytes | None) -> Steps:
    if packed is None:
        return Steps()
    import dill

    readers, steps = dill.loads(packed)
    return Steps(readers=readers, steps=steps)


def _settle() -> None:
    """Make this process a worker among others: they share CPUs and memory, and do not fill the terminal with logs."""
    pa.default_memory_pool().release_unused()
    pa.set_cpu_count(1)
    logger.disable("datatrove")


def set_up_scatter(job: Job, packed: bytes | None, tasks: int) -> TaskFunction[ScatterTask, ScatterRecord]:
    """Return what does a scatter task.

    Args:
        job: the job.
        packed: the user's blocks, see `Steps.pack`.
        tasks: number of all scatter tasks.
    """
    _settle()
    return partial(_scatter, job, packed, tasks, Scratch())


def _scatter(
    job: Job, packed: bytes | None, tasks: int, scratch: Scratch, task: ScatterTask, report: Report
) -> ScatterRecord:
    # Blocks keep state, so each task has its own, as under datatrove's executors.
    own = _unpack(packed)
    blocks = scatter_blocks({task.index: task}, job, readers=own.readers, steps=own.steps)
    for block in blocks:
        if isinstance(block, SourceReader | SpillWriter):
            block.report = report
        if isinstance(block, SpillWriter):
            block.scratch = scratch
    run_blocks(blocks, task.index, tasks)
    if packed is not None:
        with atomic_file(job.scatter_folder(task.key) / STATS_NAME) as file:
            file.write(PipelineStats(blocks).to_json().encode())
    writer = blocks[-1]
    record = writer.record if isinstance(writer, SpillWriter) else None
    if record is None:
        raise RuntimeError(f"{task.name}: ended without a record")
    return record


def set_up_gather(job: Job, plan: GroupPlan) -> TaskFunction[int, GatherRecord]:
    """Return what does a gather task.

    Args:
        job: the job.
        plan: its gather tasks.
    """
    _settle()
    return partial(_gather, job, plan, Scratch())


def _gather(job: Job, plan: GroupPlan, scratch: Scratch, group: int, report: Report) -> GatherRecord:
    return job.gather_group(plan, group, partial(report, 0), scratch)


def total_stats(job: Job, tasks: Sequence[ScatterTask]) -> PipelineStats | None:
    """Return what datatrove's steps counted, over all tasks; None if there were no steps.

    Args:
        job: the job.
        tasks: its scatter tasks.
    """
    paths = [job.scatter_folder(task.key) / STATS_NAME for task in tasks]
    found = [PipelineStats.from_json(json.loads(path.read_bytes())) for path in paths if path.exists()]
    return sum(found, start=PipelineStats()) if found else None
