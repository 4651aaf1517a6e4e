"""Which task is next and what became of each, without knowing what runs them; all executors share it."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Sequence
from typing import Final, Generic

from blt_data.executors.base import Amounts, R, Report, TaskFailure

log = logging.getLogger(__name__)

#: No pause before another attempt is longer, in seconds.
_LONGEST_PAUSE: Final = 60.0


class Schedule(Generic[R]):
    """The tasks of one run. Times are seconds of any clock that does not go back.

    Args:
        names: n names of tasks.
        attempts: how often a task is tried.
        pause: seconds before the second attempt; each further one waits twice as long.
        on_progress: told of progress, and of what failed attempts take back.
        on_result: told of each result.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        attempts: int,
        pause: float,
        on_progress: Report | None,
        on_result: Callable[[int, R], None] | None,
    ) -> None:
        self._names, self._attempts, self._pause = names, attempts, pause
        self._on_progress, self._on_result = on_progress, on_result
        self._ready = list(range(len(names)))  # a heap: sorted as it is
        self._waiting: list[tuple[float, int]] = []  # a heap of (time from which it may start, index)
        self._running: dict[int, Amounts] = {}
        self._tried = [0] * len(names)
        self._failures: dict[int, TaskFailure] = {}

    @property
    def unfinished(self) -> int:
        """Return how many tasks have neither succeeded nor been given up."""
        return len(self._ready) + len(self._waiting) + len(self._running)

    @property
    def failures(self) -> tuple[TaskFailure, ...]:
        """Return the tasks that were given up, in their order."""
        return tuple(self._failures[index] for index in sorted(self._failures))

    def startable(self, now: float) -> int:
        """Return how many tasks could start at once.

        Args:
            now: the time.
        """
        while self._waiting and self._waiting[0][0] <= now:
            heapq.heappush(self._ready, heapq.heappop(self._waiting)[1])
        return len(self._ready)

    def take(self, now: float) -> int | None:
        """Return the task to start, which counts as running from here on, or None if there is none at present.

        Args:
            now: the time.
        """
        if not self.startable(now):
            return None
        index = heapq.heappop(self._ready)
        self._running[index] = (0, 0, 0)
        self._tried[index] += 1
        return index

    def seconds_to_next(self, now: float) -> float | None:
        """Return after how many seconds a task that waits for another attempt may start, or None if none waits.

        Args:
            now: the time.
        """
        return max(0.0, self._waiting[0][0] - now) if self._waiting else None

    def progress(self, index: int, amounts: Amounts) -> None:
        """Count what a running task did since it last told.

        Args:
            index: the task.
            amounts: what it did.
        """
        if any(amounts):
            before = self._running[index]
            self._running[index] = (before[0] + amounts[0], before[1] + amounts[1], before[2] + amounts[2])
            if self._on_progress is not None:
                self._on_progress(*amounts)

    def succeed(self, index: int, result: R) -> None:
        """Note that a running task has ended well.

        Args:
            index: the task.
            result: what it returned.
        """
        del self._running[index]
        if self._on_result is not None:
            self._on_result(index, result)

    def fail(self, index: int, message: str, *, again: bool, now: float) -> None:
        """Note that an attempt has failed; the task waits for another one or is given up.

        Args:
            index: the task.
            message: one sentence.
            again: whether another attempt could go better.
            now: the time.
        """
        done = self._running.pop(index)
        if any(done) and self._on_progress is not None:
            self._on_progress(-done[0], -done[1], -done[2])
        tried = self._tried[index]
        if again and tried < self._attempts:
            log.info("%s: %s; attempt %d of %d failed", self._names[index], message, tried, self._attempts)
            pause = min(_LONGEST_PAUSE, self._pause * 2 ** (tried - 1))
            heapq.heappush(self._waiting, (now + pause, index))
        else:
            self._failures[index] = TaskFailure(index=index, name=self._names[index], message=message, attempts=tried)
