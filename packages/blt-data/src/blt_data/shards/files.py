"""Files that appear whole or not at all: temporary name, fsync, rename, fsync of the directory."""

from __future__ import annotations

import logging
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

log = logging.getLogger(__name__)

_TEMPORARY_MARK = ".tmp-"
_READ_SIZE = 1 << 20
_PIECE = 4 << 20


class HashingFile:
    """A binary file open for writing that knows the CRC-32 and the size of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._crc = 0
        self.size = 0
        self._begun = 0

    @property
    def closed(self) -> bool:
        """Whether the file is closed (Arrow asks)."""
        return self._file.closed

    @property
    def crc32(self) -> str:
        """CRC-32 (8 hexadecimal digits) of everything written so far."""
        return f"{self._crc:08x}"

    def write(self, data: bytes | memoryview | pa.Buffer) -> int:
        """Append bytes.

        Args:
            data: anything with the buffer interface.

        Returns:
            The number of bytes written.
        """
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, _PIECE):
            piece = view[start : start + _PIECE]
            self._crc = zlib.crc32(piece, self._crc)
            self._file.write(piece)
            self.size += piece.nbytes
            if self.size - self._begun >= _PIECE:
                self._begin_writing()
        return view.nbytes

    def _begin_writing(self) -> None:
        """Have the system begin to write to the disk, so that less is left to wait for in the end."""
        self._file.flush()
        # Linux begins to write what is advised to be needed no more; it drops only what is written already.
        self._need_no_more(self._begun, self.size - self._begun)
        self._begun = self.size

    def _need_no_more(self, start: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), start, size, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Wait until the bytes are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self.size >= _PIECE:
            # What is written next shall take this memory, not that of files that are being read.
            self._need_no_more(0, self.size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def atomic_file(path: Path) -> Iterator[HashingFile]:
    """Open a file that takes its name only when the block ends without an exception.

    The temporary name differs for every writer, so that two writers of one file cannot mix; the later one wins.

    Args:
        path: the final name; its directory must exist.

    Yields:
        The open file. Its `crc32` and `size` may be read after the block.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        file = HashingFile(temporary)
    except OSError as error:
        # The user knows nothing of the temporary name.
        error.filename = str(path)
        raise
    try:
        yield file
        file.sync()
        file.close()
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        # A full disk makes close() fail again as it flushes; the first error is the one to tell.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems know no fsync of directories; they order renames themselves.
        log.debug("fsync of the directory %s is not supported", path)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Remove what killed writers left in a directory; for the one process that finishes it."""
    for path in directory.glob(f".*{_TEMPORARY_MARK}*"):
        log.debug("removing %s, left by a killed writer", path)
        path.unlink(missing_ok=True)


def file_crc32(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Return the CRC-32 of a file, that of zip and PNG, as 8 hexadecimal digits.

    It tells damage to a file, twice as fast as SHA-256; what the content is, the payload's SHA-256 tells.

    Args:
        path: the file.
        advance: told of the bytes read since its last call.
    """
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ_SIZE):
            crc = zlib.crc32(block, crc)
            if advance is not None:
                advance(len(block))
    return f"{crc:08x}"
