"""An observer behind a queue and a thread: training never waits for it and never fails with it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from enum import Enum, auto

from blt_train.observers.protocol import Observer, Record

log = logging.getLogger(__name__)

#: Records that may wait for an observer; so many steps behind, it is left behind.
QUEUE_LENGTH = 10_000
#: Seconds that a run waits at its end for what an observer still has to send.
CLOSE_SECONDS = 60.0


class _Order(Enum):
    """What the thread is told besides records."""

    FLUSH = auto()
    CLOSE = auto()


class BackgroundObserver:
    """Passes records on to an observer in a thread; whatever goes wrong there is a warning, once."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Observer],
        *,
        queue_length: int = QUEUE_LENGTH,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """Start the thread, in which the observer is made, too.

        Args:
            name: of the observer, for warnings.
            make: makes it.
            queue_length: records that may wait.
            close_seconds: how long `close` waits at most.
        """
        self._name = name
        self._make = make
        self._close_seconds = close_seconds
        self._queue: queue.Queue[Record | _Order] = queue.Queue(queue_length)
        self._lock = threading.Lock()
        self._failed = False
        # A daemon: an observer that hangs must not keep the finished run from ending.
        self._thread = threading.Thread(target=self._work, name=f"{name} observer", daemon=True)
        self._thread.start()

    def observe(self, record: Record) -> None:
        """Pass a record on; returns at once."""
        self._put(record)

    def flush(self) -> None:
        """Have the observer write down what it was told; returns at once."""
        self._put(_Order.FLUSH)

    def _put(self, item: Record | _Order) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._fail(f"is {self._queue.maxsize} records behind")

    def close(self) -> None:
        """Let the observer take what waits and close it; waits for that, though not for ever."""
        try:
            self._queue.put(_Order.CLOSE, timeout=self._close_seconds)
        except queue.Full:
            self._fail(f"has not finished within {self._close_seconds:.0f} s")
            return
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self._fail(f"has not finished within {self._close_seconds:.0f} s")

    def _work(self) -> None:
        observer: Observer | None = None
        try:
            observer = self._make()
            while (item := self._queue.get()) is not _Order.CLOSE and not self._failed:
                if isinstance(item, _Order):
                    observer.flush()
                else:
                    observer.observe(item)
            observer.close()
        except Exception as error:  # whatever a logging library raises, training is worth more
            self._fail(f"failed ({type(error).__name__}: {' '.join(str(error).split())})")
            # What was told and still comes has nowhere to go; nobody may wait for room in the queue.
            while self._queue.get() is not _Order.CLOSE:
                pass

    def _fail(self, what: str) -> None:
        """Warn, the first time."""
        with self._lock:
            if self._failed:
                return
            self._failed = True
        log.warning("%s %s: it is told no more of this run; training and metrics.jsonl go on", self._name, what)
