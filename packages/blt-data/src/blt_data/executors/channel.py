"""Messages between a process and its workers: pickles with their length in front, over a pair of sockets."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

from blt_data.errors import InputError

_LENGTH: Final = struct.Struct("<Q")

_CHUNK: Final = 1 << 20


class Channel:
    """One end of the pair.

    Args:
        end: the socket; this object owns it.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()
        self._received = bytearray()

    def fileno(self) -> int:
        """Return the file descriptor, by which a selector knows this end."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; the other one sees it."""
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send a message, whole, from any thread.

        Args:
            data: the message.

        Raises:
            OSError: the other end is closed.
        """
        with self._lock:
            self._socket.sendall(_LENGTH.pack(len(data)))
            self._socket.sendall(data)

    def receive(self) -> bytes:
        """Return the next message, waiting for it.

        Raises:
            EOFError: the other end is closed.
            OSError: it broke.
        """
        while (message := self._next()) is None:
            self._read(0)
        return message

    def arrived(self) -> Iterator[bytes]:
        """Yield the messages that have arrived whole, without waiting for more.

        A process that was stopped or killed in the middle of a message must not stop its reader.

        Raises:
            EOFError: the other end is closed, and everything before was yielded.
            OSError: it broke.
        """
        ended = False
        while True:
            while (message := self._next()) is not None:
                yield message
            if ended:
                raise EOFError
            try:
                self._read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except (EOFError, ConnectionError):
                ended = True

    def _read(self, flags: int) -> None:
        data = self._socket.recv(_CHUNK, flags)
        if not data:
            raise EOFError
        self._received += data

    def _next(self) -> bytes | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        message = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return message


def serialise(value: Any, what: str) -> bytes:
    """Return a pickle that a process with another main module can read.

    What a script, a notebook or `python -c` defines itself is sent by value, which needs `dill` (datatrove brings it).

    Args:
        value: anything.
        what: what it is, for the message.

    Raises:
        InputError: it cannot be pickled.
    """
    problem: Exception
    try:
        data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        if b"__main__" not in data:
            return data
        problem = pickle.PicklingError("it is defined in the main module")
    except Exception as error:  # objects may raise anything when they are pickled
        problem = error
    try:
        by_value: bytes = import_module("dill").dumps(value, recurse=True)
    except Exception as error:
        reason = problem if isinstance(error, ModuleNotFoundError) else error
        raise InputError(
            f"{what} cannot be sent to a worker process ({' '.join(str(reason).split())}); "
            "define it in a module that can be imported, without lambdas, open files or locks"
        ) from error
    return by_value


def deserialise(data: bytes) -> Any:
    """Return what `serialise` was given.

    Args:
        data: the pickle, made by a process of ours.

    Raises:
        InputError: a module that it needs is missing here.
    """
    try:
        return pickle.loads(data)
    except ModuleNotFoundError as error:
        raise InputError(
            f"a worker process cannot import {error.name!r}, which the task needs; install it there, "
            "or start from a folder or with a PYTHONPATH in which it can be imported"
        ) from error
