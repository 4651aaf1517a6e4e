"""Reading over a network that fails now and then: what is tried again, how long it waits, and when it gives up."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Protocol, TypeVar

from blt_data.errors import InputError
from blt_data.sources.secrets import scrub

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Tries without any progress, after which reading is given up.
ATTEMPTS: Final = 7
#: Seconds before the second try; each further pause is twice as long.
FIRST_PAUSE: float = 0.5
#: Seconds that a pause lasts at most, but for one that the server asked for.
LONGEST_PAUSE: Final = 60.0
#: Seconds that a server's Retry-After is honoured at most.
LONGEST_ASKED: Final = 900.0

#: Bytes at the end of a file that are fetched in one go: where Parquet keeps its footer, and all of a small file.
TAIL_BYTES: Final = 1 << 20

_TEMPORARY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class RemoteError(OSError):
    """A remote file could not be read after several tries; another time it may work."""


class TemporaryError(Exception):
    """What may work at the next try.

    Args:
        message: what happened.
        wait: seconds that the server asks to wait, if it does.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class ByteStream(Protocol):
    """Bytes of a remote file from some position on."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at least one and at most `size`; none at the end, or where the connection was cut."""

    def skip_to(self, position: int, /) -> bool:
        """Go on at another position of the file, or return False if a new stream would be better."""

    def close(self) -> None:
        """Give the connection back."""


def temporary_status(status: int, headers: Mapping[str, str]) -> TemporaryError | None:
    """Return the temporary error that an HTTP status means, or None if trying again would not help.

    Args:
        status: the HTTP status.
        headers: the response's headers, by any case that the mapping itself allows.
    """
    if status not in _TEMPORARY:
        return None
    return TemporaryError(f"HTTP status {status}", _retry_after(headers))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header (RFC 9110, 10.2.3) asks for: a number or a date."""
    value = headers.get("Retry-After", headers.get("retry-after", "")).strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def pause_after(error: Exception, failures: int, location: str) -> None:
    """Sleep before the next try.

    Args:
        error: what the last try ended with.
        failures: tries that failed in a row.
        location: what is being read, for messages.

    Raises:
        InputError: the error itself, if it is one.
        RemoteError: it has failed too often.
    """
    if isinstance(error, InputError | RemoteError):
        raise error
    reason = scrub(" ".join(str(error).split()) or type(error).__name__)
    if failures >= ATTEMPTS:
        raise RemoteError(
            f"{location}: could not be read, {failures} times in a row ({reason}); "
            "check the network and run the same command again"
        ) from None
    asked = error.wait if isinstance(error, TemporaryError) else None
    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
    if asked is not None:
        # Many workers are told the same; they need not all come back at the same instant.
        pause = min(asked, LONGEST_ASKED) + random.uniform(0, min(1.0, 2 * FIRST_PAUSE))
    log.info("%s: %s; trying again in %.1f s", location, reason, pause)
    time.sleep(pause)


def with_retries(attempt: Callable[[], T], location: str) -> T:
    """Return what a function returns, trying again when it fails for a temporary reason.

    Args:
        attempt: raises `InputError` for what trying again would not mend.
        location: what is being read, for messages.

    Raises:
        InputError: from the function.
        RemoteError: it has failed too often.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except Exception as error:
            failures += 1
            pause_after(error, failures, location)


class RetryingFile(io.RawIOBase):
    """A remote file to read and seek in, that goes on where a broken connection left it.

    Args:
        location: what messages call the file.
        size: its bytes.
        connect: opens a stream of the file's bytes from a position on.
    """

    def __init__(self, location: str, size: int, connect: Callable[[int], ByteStream]) -> None:
        super().__init__()
        self._location, self._size, self._connect = location, size, connect
        self._position = 0
        self._stream: ByteStream | None = None
        self._stream_position = 0
        self._tail: bytes | None = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position; nothing is fetched before the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes; fewer only at the end of the file.

        Raises:
            InputError: the file is gone, or may not be read.
            RemoteError: reading has failed too often.
        """
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        start = max(0, self._size - TAIL_BYTES)
        streaming = self._stream is not None and self._stream_position == self._position
        if self._position >= start and not streaming:
            if self._tail is None:
                self._tail = self._fetch(start, self._size - start)
            offset = self._position - start
            data = self._tail[offset : offset + wanted]
        else:
            data = self._fetch(self._position, wanted)
        self._position += len(data)
        return data

    def _fetch(self, start: int, wanted: int) -> bytes:
        position, pieces, failures = start, list[bytes](), 0
        while wanted:
            try:
                piece = self._stream_at(position).read(wanted)
                if not piece:
                    raise TemporaryError(f"the connection ended at byte {position:,} of {self._size:,}")
            except Exception as error:
                self._drop()
                failures += 1
                pause_after(error, failures, self._location)
                continue
            failures = 0
            pieces.append(piece)
            wanted -= len(piece)
            position += len(piece)
            self._stream_position = position
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _stream_at(self, position: int) -> ByteStream:
        if self._stream is not None and self._stream_position != position:
            if self._stream.skip_to(position):
                self._stream_position = position
            else:
                self._drop()
        if self._stream is None:
            self._stream = self._connect(position)
            self._stream_position = position
        return self._stream

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except Exception:
                # The connection is broken anyway.
                log.debug("%s: closing a connection failed", self._location, exc_info=True)

    def close(self) -> None:
        """Give the connection back."""
        if not self.closed:
            self._drop()
        super().close()
