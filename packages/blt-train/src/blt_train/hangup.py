"""What asks a process to stop, before and while it trains; light, so that it can be had before torch is loaded."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from blt_train.errors import EXIT_REQUEUE, EXIT_SIGTERM

#: Exit status by signal: a hang-up ends a run as SIGTERM does.
STOP_STATUS = {signal.SIGTERM: EXIT_SIGTERM, signal.SIGHUP: EXIT_SIGTERM, signal.SIGUSR1: EXIT_REQUEUE}

#: File descriptors of standard output and standard error.
_OUTPUTS = (1, 2)


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let the signals of `STOP_STATUS` call a handler while the block runs; a hang-up that nohup has ignored stays so.

    Args:
        handler: takes the signal's number. Outside the main thread, where Python allows none, it is never called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [
        number
        for number in STOP_STATUS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN  # nohup
    ]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """End the process with one sentence if a signal comes while the block runs: there is nothing to write yet.

    The trainer and the launcher of several processes have handlers of their own, and bring these back afterwards.
    """
    with handling(_end):
        yield


def discard_dead_terminal() -> None:
    """Let output that went to a terminal which is gone go nowhere; writing to it would be an error."""
    for output in _OUTPUTS:
        try:
            termios.tcgetattr(output)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, output)
                os.close(nowhere)


def _end(number: int, _frame: FrameType | None) -> None:
    discard_dead_terminal()
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {name}; run the same command again to go on\n".encode())
    # Not by an exception, which what is being imported might take for its own.
    os._exit(STOP_STATUS[signal.Signals(number)])
