"""What a worker process of `LocalExecutor` does; started as a fresh interpreter by `local.py`."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import Any, Final

from blt_data.executors.attempt import Meter, Outcome, Problem, attempt
from blt_data.executors.base import Amounts
from blt_data.executors.channel import Channel, deserialise, serialise

#: prctl's PR_SET_PDEATHSIG, see prctl(2).
_PARENT_DEATH_SIGNAL: Final = 1

#: A message of the starting process that is no task: there is nothing more to do.
STOP: Final = b""


def main(end: int, setup: int, parent: int) -> None:
    """Do tasks until told to stop.

    It answers first with `None` when it is set up, or with the `Problem` that kept it from it; then, for every task,
    with any number of `Amounts` and one `Outcome`.

    Args:
        end: file descriptor of this end of the socket pair.
        setup: file descriptor of a file with the pickled `Setup`, shared by all workers.
        parent: process id of the process that started this one.
    """
    _die_with(parent)
    # The starting process decides what an interrupt from the keyboard means; it had this signal blocked until here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.set_inheritable(end, False)
    os.set_inheritable(setup, False)
    channel = Channel(socket.socket(fileno=end))
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, inbox), daemon=True).start()
    try:
        function = deserialise(_content(setup))()
    except BaseException as error:  # whatever it is, the starting process tells it
        _send(channel, Problem.of(error))
        return
    _send(channel, None)

    def send_progress(*amounts: int) -> None:
        _send(channel, amounts)

    while (data := inbox.get()) != STOP:
        _send(channel, attempt(function, partial(deserialise, data), Meter(send_progress)))


def _receive(channel: Channel, inbox: queue.SimpleQueue[bytes]) -> None:
    """Pass messages on; the end of the starting process is the end of this one, in the middle of a task or not."""
    message = b" "
    with suppress(EOFError, OSError):
        while message != STOP:
            message = channel.receive()
            inbox.put(message)
    if message != STOP:
        os._exit(1)


def _send(channel: Channel, message: Outcome | Problem | Amounts | tuple[int, ...] | None) -> None:
    try:
        data = serialise(message, "the result of a task")
    except Exception as error:
        if not isinstance(message, Outcome):
            raise
        data = serialise(Outcome(amounts=message.amounts, problem=Problem.of(error)), "a message")
    with suppress(OSError):  # nobody is there to read it; `_receive` sees that too
        channel.send(data)


def _content(descriptor: int) -> bytes:
    # The position of the file is shared with the other workers, so it is read by offsets.
    size = os.fstat(descriptor).st_size
    parts: list[bytes] = []
    read = 0
    while read < size:
        parts.append(os.pread(descriptor, size - read, read))
        read += len(parts[-1])
    return b"".join(parts)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process when the starting one dies, even while a task holds the interpreter's lock."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc: Any = ctypes.CDLL(None, use_errno=True)
            libc.prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
