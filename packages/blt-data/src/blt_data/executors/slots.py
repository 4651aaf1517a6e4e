"""Places for workers, and which of them are worth another try."""

from __future__ import annotations

import logging
from collections import Counter

from blt_data.errors import InputError

log = logging.getLogger(__name__)


class Slots:
    """Counts workers that end before their first task.

    One GPU out of eight, or one machine, may be broken: that must neither stop the others nor be tried for ever.

    Args:
        size: how many places there are.
        attempts: how often in a row a worker may end so before its place is given up.
    """

    def __init__(self, size: int, attempts: int) -> None:
        self.size, self._attempts = size, attempts
        self._ever_set_up = False
        self._false_starts: Counter[int] = Counter()
        self._given_up: set[int] = set()

    def free(self, taken: set[int]) -> list[int]:
        """Return the places in which a worker may be started, in ascending order.

        Args:
            taken: those that have one.
        """
        return [number for number in range(self.size) if number not in taken and number not in self._given_up]

    def set_up(self) -> None:
        """Note that a worker was set up."""
        self._ever_set_up = True

    def worked(self, number: int) -> None:
        """Note that the worker in a place has ended an attempt, well or not."""
        self._false_starts[number] = 0

    def false_start(self, number: int, message: str, *, trace: str = "") -> None:
        """Note that a worker has ended before it had a task.

        Args:
            number: its place.
            message: one sentence.
            trace: the traceback, if any, for the log.

        Raises:
            InputError: there is no use in going on.
        """
        log.debug("worker %d did not start: %s\n%s", number, message, trace)
        self._false_starts[number] += 1
        # Of many workers a few may be unlucky.
        if not self._ever_set_up and self._false_starts.total() >= max(self._attempts, self.size):
            raise InputError(f"no worker could be set up: {message}")
        if self._false_starts[number] >= self._attempts:
            self._given_up.add(number)
            log.warning("worker %d is given up: %s", number, message)
        if len(self._given_up) == self.size:
            raise InputError(f"no worker can be set up any more: {message}")
