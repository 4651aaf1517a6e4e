"""Signals that ask a run to stop: SIGTERM or a hang-up ends it for good, SIGUSR1 until the scheduler starts it again.

A run that has taken a step finishes the step that it is at, writes a checkpoint and exits with a status that says so.
Until the end of its first step nothing would be lost: it exits at once, however long compiling the model may take.
Since not every process of a job gets a signal at the same moment, each gives what it was asked for as votes, which are
summed with the loss, and all stop at the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from blt_train.errors import EXIT_REQUEUE, EXIT_SIGTERM
from blt_train.hangup import STOP_STATUS, discard_dead_terminal, handling
from blt_train.runtime import Runtime

#: A second SIGTERM within so many seconds may be the same request: a scheduler signals every process of a job, and the
#: launcher passes on what it got.
SAME_REQUEST_SECONDS = 5.0
#: How often processes ask each other in loops that have no sums of their own.
_PASSES_PER_EXCHANGE = 8


class Stopped(SystemExit):
    """A signal ends what the process is at."""

    def __init__(self, status: int) -> None:
        """Take the exit status.

        Args:
            status: `errors.EXIT_SIGTERM` or `errors.EXIT_REQUEUE`.
        """
        super().__init__(status)
        self.status = status


class StoppedEarly(Stopped):
    """The run was asked to stop before it had anything to lose."""


class StopAgreed(Stopped):
    """All processes have agreed to stop in the middle of what they were at."""


class StopRequest:
    """What this process was asked for, and what all processes of the job have agreed on."""

    def __init__(self) -> None:
        """Nothing was asked for yet, and nothing would be lost."""
        self.nothing_to_lose = True
        """Whether a signal may end the process at once: no step has been taken since the start or the checkpoint."""
        self._asked = 0
        self._first_sigterm_at: float | None = None

    @property
    def votes(self) -> tuple[float, float]:
        """What this process gives to the sums over all: one for SIGTERM or SIGHUP, one for SIGUSR1."""
        return float(self._asked == EXIT_SIGTERM), float(self._asked == EXIT_REQUEUE)

    @property
    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked != 0

    @staticmethod
    def agreed(sums: Sequence[float]) -> int:
        """Return the exit status that all processes have agreed on; 0 to go on.

        Args:
            sums: of all processes' votes.
        """
        terminations, requeues = sums
        # Who asks for a checkpoint in order to go on later means to go on, whatever else the job is sent.
        return EXIT_REQUEUE if requeues else EXIT_SIGTERM if terminations else 0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Take a signal in.

        Args:
            number: SIGTERM, SIGHUP or SIGUSR1.
        """
        status = STOP_STATUS[signal.Signals(number)]
        if number == signal.SIGHUP:
            discard_dead_terminal()
        if number == signal.SIGTERM:
            self._end_if_repeated(time.monotonic())
        if not self._asked:
            self._asked = status
        if self.nothing_to_lose:
            raise StoppedEarly(status)

    def _end_if_repeated(self, now: float) -> None:
        """End the process without waiting at a second SIGTERM, unless something else was asked for before."""
        first = self._first_sigterm_at
        if first is None:
            self._first_sigterm_at = now
        elif self._asked == EXIT_SIGTERM and now - first > SAME_REQUEST_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


class StopPoint:
    """A place in a loop that all processes pass equally often, and at which they may agree to stop."""

    def __init__(self, request: StopRequest, runtime: Runtime) -> None:
        """Take what is asked of this process.

        Args:
            request: of this process.
            runtime: its place among all.
        """
        self._request, self._runtime = request, runtime
        self._passes = 0

    def __call__(self) -> None:
        """Pass; every eighth time the processes ask each other, which costs an exchange.

        Raises:
            StopAgreed: one of them was asked to stop.
        """
        self._passes += 1
        if self._passes % _PASSES_PER_EXCHANGE:
            return
        status = StopRequest.agreed(self._runtime.sum(self._request.votes))
        if status:
            raise StopAgreed(status)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, let SIGTERM, SIGHUP and SIGUSR1 ask for a stop rather than end the process.

    Yields:
        The request. Outside the main thread, where Python allows no handlers, nothing makes one.
    """
    request = StopRequest()
    with handling(request.handle):
        yield request
