"""One attempt at one task, inside a worker: what it did, and what came of it, in a form that can be sent."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blt_data.errors import InputError
from blt_data.executors.base import Amounts, Report, describe


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why something failed, without the exception itself, which another process may not be able to read."""

    message: str
    """One sentence."""
    input_at_fault: bool
    """It was an `InputError`: another attempt would fail as well."""
    trace: str
    """The traceback, for the log."""

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        """Return what there is to say of an exception."""
        return cls(
            message=describe(error),
            input_at_fault=isinstance(error, InputError),
            trace="".join(traceback.format_exception(error)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How an attempt ended."""

    amounts: Amounts
    """Progress that was not told before."""
    result: Any = None
    """What the task returned, if there is no problem."""
    problem: Problem | None = None


class Meter:
    """Adds up progress from any thread, and passes the sums on no more often than worth while.

    Args:
        send: called with sums, in the thread that reports.
        interval: least seconds between two calls.
    """

    def __init__(self, send: Report | None = None, *, interval: float = 0.2) -> None:
        self._send, self._interval = send, interval
        self._lock = threading.Lock()
        self._calls = 0
        self._sums = [0, 0, 0]
        self._last = time.monotonic()
        self._closed = False

    def __call__(self, source_bytes: int, documents: int, content_bytes: int) -> None:
        """Count progress; this is the `Report` that a task is given."""
        with self._lock:
            if self._closed:
                return
            self._calls += 1
            self._sums[0] += source_bytes
            self._sums[1] += documents
            self._sums[2] += content_bytes
            now = time.monotonic()
            if self._send is not None and now - self._last >= self._interval:
                self._last = now
                self._send(*self._take())

    def look(self) -> tuple[Amounts, int]:
        """Return what was counted and not yet passed on, and the number of calls, which tells that the task lives."""
        with self._lock:
            return (self._sums[0], self._sums[1], self._sums[2]), self._calls

    def close(self) -> Amounts:
        """Return what is left; a thread that the task forgot cannot add to it any more."""
        with self._lock:
            self._closed = True
            return self._take()

    def _take(self) -> Amounts:
        sums = (self._sums[0], self._sums[1], self._sums[2])
        self._sums = [0, 0, 0]
        return sums


def attempt(
    function: Callable[[Any, Report], Any],
    load_task: Callable[[], Any],
    meter: Meter,
    *,
    catch: type[BaseException] = BaseException,
) -> Outcome:
    """Do a task, whatever it raises.

    Args:
        function: what `setup` returned.
        load_task: gives the task; it may fail as well.
        meter: takes the task's progress.
        catch: what counts as the task's failure. In a worker that is everything: even `sys.exit()` in a task must not
            look like a worker that died.
    """
    try:
        result = function(load_task(), meter)
    except catch as error:
        return Outcome(amounts=meter.close(), problem=Problem.of(error))
    return Outcome(amounts=meter.close(), result=result)
