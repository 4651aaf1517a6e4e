"""Byte limits, of a source and of everything: the first documents in source order, whole ones, as far as they fit.

How much a task holds is known only once it is read. So tasks run in waves: as many as will probably be needed, each
with the most that it may take; then those that turn out to have taken too much, because the ones before them took
their part, run again with what is left. What is taken depends neither on the waves nor on the workers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from blt_data.errors import InputError
from blt_data.jobs import ScatterTask
from blt_data.records import Beyond, ScatterRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of a job."""

    total_bytes: int | None
    """Content bytes of all sources together."""
    of_source: Mapping[int, int]
    """Index of a source to its content bytes, where it has a limit."""

    @property
    def any(self) -> bool:
        """Whether there is a limit."""
        return self.total_bytes is not None or bool(self.of_source)


class Waves:
    """Decides which tasks run, and which documents of theirs count.

    Args:
        tasks: all tasks, in source order.
        limits: of the job.
    """

    def __init__(self, tasks: Sequence[ScatterTask], limits: Limits) -> None:
        self._limits = limits
        self.chosen: list[ScatterTask] = []
        """The tasks that count, with their limits; complete once there is no next wave."""
        if limits.total_bytes is None:
            by_source: dict[int, list[ScatterTask]] = defaultdict(list)
            for task in tasks:
                by_source[task.source].append(task)
            self._lines = [_Line(line, limits) for line in by_source.values()]
        else:
            self._lines = [_Line(tasks, limits)]

    def shortages(self) -> dict[int, int]:
        """Return index of each source that had less than its limit to the content bytes that it gave."""
        return {
            source: line.taken[source]
            for line in self._lines
            for source, limit in self._limits.of_source.items()
            if source in line.sources - line.reached and line.taken[source] < limit
        }

    def next(self) -> list[ScatterTask]:
        """Return the tasks to run next, each with the most that it may take; none at the end."""
        wave = [task for line in self._lines for task in line.next()]
        if not wave:
            self.chosen = [task for line in self._lines for task in line.chosen]
        return wave

    def take(self, records: Mapping[int, ScatterRecord]) -> None:
        """Take note of what the tasks of the last wave did.

        Args:
            records: index of a task to its record.

        Raises:
            InputError: not even the first document fits.
        """
        for line in self._lines:
            line.take(records)


class _Line:
    """Tasks whose limits depend on those before them."""

    def __init__(self, tasks: Sequence[ScatterTask], limits: Limits) -> None:
        self.chosen: list[ScatterTask] = []
        self.sources = {task.source for task in tasks}
        self.reached: set[int] = set()
        """Sources of which something was left out."""
        self.taken: dict[int, int] = defaultdict(int)
        """Source to content bytes."""
        self._tasks, self._limits = tasks, limits
        self._at = 0
        self._wave: list[ScatterTask] = []

    def next(self) -> list[ScatterTask]:
        """Return tasks until they hold, by their weights, what may still be taken."""
        self._wave = []
        expected = dict(self.taken)
        for task in self._tasks[self._at :]:
            if self._wave and (left := self._allowed(task, expected)) is not None and left <= 0:
                # Of another source there may still be some to take.
                if self._limits.total_bytes is not None and sum(expected.values()) >= self._limits.total_bytes:
                    break
                continue
            self._wave.append(replace(task, limit_bytes=self._allowed(task, self.taken)))
            expected[task.source] = expected.get(task.source, 0) + task.expected_bytes
        return self._wave

    def take(self, records: Mapping[int, ScatterRecord]) -> None:
        """Go on to the first task that is not known to have taken the right documents."""
        for task in self._wave:
            if task.index != self._tasks[self._at].index:
                return
            allowed = self._allowed(task, self.taken)
            record = records[task.index]
            if not record.serves(allowed):
                return
            self.chosen.append(replace(task, limit_bytes=allowed))
            self.taken[task.source] += record.content_bytes
            self._at += 1
            if record.beyond is not None:
                self._end(task, record.beyond)
            if self._at == len(self._tasks):
                return

    def _allowed(self, task: ScatterTask, taken: Mapping[int, int]) -> int | None:
        """Return the content bytes that a task may take, or None if it may take all."""
        of_source, total = self._limits.of_source.get(task.source), self._limits.total_bytes
        left = []
        if of_source is not None:
            left.append(of_source - taken.get(task.source, 0))
        if total is not None:
            left.append(total - sum(taken.values()))
        return max(0, min(left)) if left else None

    def _end(self, task: ScatterTask, beyond: Beyond) -> None:
        """Leave out what follows the document at which a limit was reached."""
        total, taken = self._limits.total_bytes, sum(self.taken.values())
        all_done = total is not None and taken + beyond.bytes > total
        limit = total if all_done else self._limits.of_source[task.source]
        if not (taken if all_done else self.taken[task.source]):
            raise InputError(
                f"the first document{'' if all_done else f' of {task.name}'}, {beyond.document_id!r}, has "
                f"{beyond.bytes:,} bytes, more than the limit of {limit:,}; raise the limit"
            )
        self.reached |= self.sources if all_done else {task.source}
        while self._at < len(self._tasks) and (all_done or self._tasks[self._at].source == task.source):
            self._at += 1
