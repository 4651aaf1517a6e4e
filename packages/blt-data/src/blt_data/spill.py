"""Spill files: the documents of one scatter task, sorted by key in one or more sub-runs; private to one job.

A sub-run of n documents is

    table     n + 1 rows of `ROW` (the last one says where ids and contents end), sorted by (key, place)
    ids       UTF-8, end to end
    contents  bytes, end to end

so that the documents of consecutive cells lie together: a gather task reads three ranges of each sub-run. The files are
little-endian, hold no pickles, and have no name outside the record of their task (see records.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError

#: What is kept of each document beside its id and its content.
ROW: Final = np.dtype(
    [
        ("key", "<u8"),
        ("check", "<u8"),  # 64 more bits of the content's digest, where duplicates are dropped; else 0
        ("place", "<u8"),  # in source order
        ("content", "<i8"),  # where its content begins, within the sub-run's contents
        ("id", "<i8"),  # where its id begins, within the sub-run's ids
        ("source", "<u4"),  # index into the sources of the task
        ("split", "<u4"),  # index into the splits of the job
    ]
)

Rows: TypeAlias = npt.NDArray[Any]

#: The system takes no more pieces than this in one call (POSIX promises 16, Linux and macOS have 1024).
_PIECES: Final = min(1024, os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubRun:
    """Where a sub-run lies in its file."""

    offset: int
    """Of the table, in bytes."""
    documents: int
    id_bytes: int
    content_bytes: int

    @property
    def ids(self) -> int:
        """Where the ids begin, in bytes from the beginning of the file."""
        return self.offset + (self.documents + 1) * ROW.itemsize

    @property
    def contents(self) -> int:
        """Where the contents begin, in bytes from the beginning of the file."""
        return self.ids + self.id_bytes

    @property
    def end(self) -> int:
        """Where the sub-run ends, in bytes from the beginning of the file."""
        return self.contents + self.content_bytes


class SpillFile:
    """A spill file open for writing, in a `with` block.

    Args:
        path: the file, which must not exist.
        durable: whether it is on the disk at the end of the block.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, *, durable: bool) -> None:
        self.path = path
        self._durable = durable
        self.sub_runs: list[SubRun] = []
        self.size = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self._durable:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        if error is not None:
            self.path.unlink(missing_ok=True)

    def append(self, table: Rows, ids: memoryview, contents: Iterator[list[memoryview]]) -> None:
        """Write a sub-run.

        Args:
            table: n + 1 rows, of which the last says where ids and contents end.
            ids: the ids, end to end.
            contents: the contents in the table's order, in lists of pieces.

        Raises:
            OSError: the file cannot be written.
        """
        run = SubRun(
            offset=self.size,
            documents=len(table) - 1,
            id_bytes=int(table["id"][-1]),
            content_bytes=int(table["content"][-1]),
        )
        try:
            self._write([table.view(np.uint8).data, ids])
            for pieces in contents:
                self._write(pieces)
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        if self.size != run.end:
            raise RuntimeError(f"{self.path}: {self.size} bytes were written, {run.end} were meant")
        self.sub_runs.append(run)

    def _write(self, pieces: Sequence[memoryview]) -> None:
        for first in range(0, len(pieces), _PIECES):
            left = [piece for piece in pieces[first : first + _PIECES] if piece.nbytes]
            while left:
                written = os.writev(self._descriptor, left)
                self.size += written
                left = _after(left, written)


def _after(pieces: list[memoryview], done: int) -> list[memoryview]:
    """Return what is left of pieces once the first `done` bytes are through."""
    for index, piece in enumerate(pieces):
        if done < piece.nbytes:
            return [piece[done:], *pieces[index + 1 :]]
        done -= piece.nbytes
    return []


class SpillReader:
    """A spill file open for reading; in a `with` block.

    Read by `pread`, not through a memory map, so that what is read counts as memory only where we put it.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def table(self, run: SubRun, start: int, stop: int) -> Rows:
        """Return some rows of a sub-run's table.

        Args:
            run: the sub-run.
            start: first document.
            stop: one past the last document.

        Returns:
            `ROW` [stop - start + 1]: one row more than documents, to say where the last one ends.

        Raises:
            InputError: the file is damaged.
            OSError: it cannot be read.
        """
        rows = np.empty(stop - start + 1, ROW)
        self.read([rows.view(np.uint8).data], run.offset + start * ROW.itemsize)
        return rows

    def ids(self, run: SubRun, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return a range of a sub-run's ids, end to end.

        Args:
            run: the sub-run.
            start: first byte, as the table says.
            stop: one past the last byte.

        Returns:
            uint8 [stop - start].

        Raises:
            InputError: the file is damaged.
            OSError: it cannot be read.
        """
        data = np.empty(max(0, stop - start), np.uint8)
        self.read([data.data], run.ids + start)
        return data

    def read(self, pieces: Sequence[memoryview], offset: int) -> None:
        """Fill pieces with consecutive bytes of the file.

        Args:
            pieces: where to put them.
            offset: where in the file they begin.

        Raises:
            InputError: the file ends before.
            OSError: it cannot be read.
        """
        for first in range(0, len(pieces), _PIECES):
            left = [piece for piece in pieces[first : first + _PIECES] if piece.nbytes]
            while left:
                got = os.preadv(self._descriptor, left, offset)
                if not got:
                    raise damaged(self.path)
                offset += got
                left = _after(left, got)


def damaged(path: Path) -> InputError:
    """Return the error for a spill file that is not what its task wrote.

    Args:
        path: the spill file, in its task's folder within the work directory.
    """
    return InputError(f"{path}: is damaged; delete {path.parents[2]} and run the same command again")
