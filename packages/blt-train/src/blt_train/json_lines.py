"""Files of one JSON object per line that grow with a run and are cut back when it resumes from an earlier step.

A killed process may leave a last line without its end; readers pass over it and the next launch cuts it off.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self

from blt_train.errors import CheckpointError
from blt_train.files import naming


class JsonLinesWriter:
    """Appends objects to a file; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending.

        Args:
            path: the file; it may not exist yet.
        """
        self._path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failed write closing fails again; the first error is the one to tell.
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            self._file.close()

    def write_line(self, line: str) -> None:
        """Append one line, which ends in a newline; readers see it at once."""
        with naming(self._path):
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Make all lines so far durable, as a checkpoint that vouches for them needs."""
        os.fsync(self._file.fileno())


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read a file line by line.

    Args:
        path: the file; a missing one has no lines.

    Yields:
        Each whole line's number, from 1, and its bytes without the newline.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):  # what follows the last newline is not whole
                yield number, line[:-1]


def read_last_lines(path: Path, size: int = 1 << 20) -> list[bytes]:
    """Return the whole lines at the end of a file without their newlines, however long the file.

    Args:
        path: the file; a missing one has no lines.
        size: bytes from the end that are looked at.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - size)
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is not whole
    return lines[1:] if start else lines


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises:
        ValueError: it holds none.
    """
    try:
        content = json.loads(line)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("is no JSON object")
    return content


def cut_after_step(path: Path, step: int, check: Callable[[bytes], int]) -> None:
    """Cut off the lines that tell of steps after `step`, and a last line that is not whole.

    Lines stand in the order of steps, so one `truncate` of the file does it, which is atomic.

    Args:
        path: the file; a missing one is left missing.
        step: last step to keep; below 0 keeps nothing.
        check: returns the step that a line tells of; raises ValueError or TypeError for a line that is none.

    Raises:
        CheckpointError: a line to keep is none of this file; it is named.
    """
    if not path.exists():
        return
    end = 0
    for number, line in read_lines(path) if step >= 0 else ():
        with naming_line(path, number):
            if check(line) > step:
                break
        end += len(line) + 1
    with naming(path), path.open("r+b") as file:
        file.truncate(end)
        os.fsync(file.fileno())


@contextlib.contextmanager
def naming_line(path: Path, number: int) -> Iterator[None]:
    """Name file and line in the error of a line that cannot be understood.

    Raises:
        CheckpointError: in place of ValueError and TypeError.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: line {number} {error}") from error
