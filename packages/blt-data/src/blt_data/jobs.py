"""A job: its tasks, its options and where each task keeps what it makes.

    OUTPUT/.work/scatter/<key>/            spill file of one scatter task, its index and its record
    OUTPUT/.work/bounds-<key>              where each group's documents are in the spill files
    OUTPUT/.work/gather/<key>/<group>/     staged shards of one gather task and their record

Everything a task needs is in its `ScatterTask` or group and in the `Job`, which are small and travel to workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blt_data.errors import InputError
from blt_data.gather import GatherOptions, gather
from blt_data.groups import GroupPlan, Spilled, plan_groups
from blt_data.reading import Reading, Unit
from blt_data.records import GatherRecord, ScatterRecord, read_gather_record, read_scatter_record
from blt_data.scatter import ScatterOptions
from blt_data.scratch import Scratch
from blt_data.shards import MANIFEST_NAME
from blt_data.skips import OnError, Skips
from blt_data.splits import split_directory

WORK_NAME: Final = ".work"

#: Bytes of text that a byte of a compressed file holds, roughly.
_EXPANSION: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterTask:
    """What one scatter task reads."""

    index: int
    """Rank of the task; tasks are in source order."""
    name: str
    """For messages."""
    key: str
    """Checksum of all that decides the task's documents."""
    source: int = 0
    """Index of the source among those of the job."""
    units: tuple[Unit, ...] = ()
    reading: Reading | None = None
    """None if the documents come from a reader that is not ours."""
    limit_bytes: int | None = None
    """Content bytes at which the task ends, whole documents only."""

    @property
    def weight(self) -> int:
        """Source bytes to read."""
        return sum(unit.weight for unit in self.units)

    @property
    def expected_bytes(self) -> int:
        """Content bytes that the task will probably give."""
        return sum(unit.weight * (_EXPANSION if unit.file.compression is not None else 1) for unit in self.units)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What all tasks of a job are told."""

    output: Path
    scatter: ScatterOptions
    gather: GatherOptions
    on_error: OnError
    source: str
    """What the user calls the source, for messages."""
    skipped: Skips
    """Files left out before anything is read."""
    key: str
    """Checksum of all that decides what shards say beside their documents."""

    @property
    def work(self) -> Path:
        """Directory of everything that is removed at the end."""
        return self.output / WORK_NAME

    def is_complete(self) -> bool:
        """Return whether every manifest of the output is there."""
        return all((split_directory(self.output, split) / MANIFEST_NAME).exists() for split in self.scatter.splits)

    def scatter_folder(self, key: str) -> Path:
        """Return the folder of a scatter task."""
        return self.work / "scatter" / key

    def gather_folder(self, plan: GroupPlan, group: int) -> Path:
        """Return the folder of a gather task."""
        return self.work / "gather" / self.gather_key(plan) / f"{group:06d}"

    def gather_key(self, plan: GroupPlan) -> str:
        """Return the name of the folder of all gather tasks."""
        return hashlib.sha256(f"{plan.key} {self.key}".encode()).hexdigest()[:32]

    def scattered(self, task: ScatterTask) -> ScatterRecord | None:
        """Return the record of a scatter task, or None if it is not finished with its limit."""
        record = read_scatter_record(self.scatter_folder(task.key))
        return record if record is not None and record.serves(task.limit_bytes) else None

    def gathered(self, plan: GroupPlan, group: int) -> GatherRecord | None:
        """Return the record of a gather task, or None if it is not finished."""
        return read_gather_record(self.gather_folder(plan, group))

    def plan(self, records: Mapping[int, ScatterRecord], tasks: Sequence[ScatterTask]) -> GroupPlan:
        """Return the gather tasks of a job.

        Args:
            records: index of a scatter task to its record.
            tasks: the scatter tasks that count, in source order; all of them are finished.

        Raises:
            OSError: an index cannot be read, or the plan cannot be written.
        """
        spilled = [
            Spilled(
                folder=self.scatter_folder(task.key),
                key=f"{task.key} {records[task.index].content_bytes}",
                record=records[task.index],
            )
            for task in tasks
        ]
        return plan_groups(spilled, self.work, splits=len(self.scatter.splits), shard_bytes=self.gather.shard_bytes)

    def plan_from_disk(self, tasks: Sequence[ScatterTask]) -> GroupPlan:
        """Return the gather tasks of a job whose scatter tasks ran elsewhere.

        Args:
            tasks: the scatter tasks, in source order.

        Raises:
            InputError: one of them is not finished.
            OSError: see `plan`.
        """
        records = {}
        for task in tasks:
            record = self.scattered(task)
            if record is None:
                raise InputError(
                    f"{self.output}: reading {task.name} is not finished; run the pipeline's first stage to its end"
                )
            records[task.index] = record
        return self.plan(records, tasks)

    def gather_group(
        self, plan: GroupPlan, group: int, report: Callable[[int, int], None], scratch: Scratch
    ) -> GatherRecord:
        """Do a gather task; see `gather`."""
        return gather(plan, group, self.gather_folder(plan, group), self.gather, report, scratch)
