"""What the command lines of all packages share: progress, tables, and errors told in one sentence.

Progress and messages go to standard error, results to standard output, so that output can be piped. When standard
error is no terminal, a progress bar becomes one line a minute.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, ParamSpec, Protocol, Self, TypeVar

import click
import pyarrow as pa
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds between lines of progress where standard error is no terminal.
LINE_INTERVAL = 60.0

#: Exit status for bad input, as opposed to 2, which click uses for a misspelt command line.
EXIT_BAD_INPUT = 1


#: What a user can do about the system's errors.
_MENDS = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space and run the same command again"
) | dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions or name another path")


class ProgressBar(Protocol):
    """What a long task is given to tell how far it is."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Count `amount` more units as done; `note` is shown beside the bar."""


class _RichBar:
    """A progress bar on a terminal."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        counts: ProgressColumn = _DecimalBytesColumn() if unit == "B" else MofNCompleteColumn()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            counts,
            TextColumn("" if unit == "B" else unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(description, total=total, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        fields = {"note": note} if note else {}
        self._progress.update(self._task, advance=amount, **fields)  # type: ignore[arg-type]


class _LineBar:
    """One line a minute, for logs and pipes."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = 0.0
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last > self._started:
            self._write("")

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self._done += amount
        if time.monotonic() - self._last >= LINE_INTERVAL:
            self._last = time.monotonic()
            self._write(note)

    def _write(self, note: str) -> None:
        done = format_bytes(self._done) if self._unit == "B" else f"{self._done:,.0f} {self._unit}"
        share = f" ({100 * self._done / self._total:.0f}%)" if self._total else ""
        seconds = time.monotonic() - self._started
        click.echo(f"{self._description}: {done}{share} in {seconds:.0f} s {note}".rstrip(), err=True)


class _DecimalBytesColumn(ProgressColumn):
    """Done and total bytes, in decimal units."""

    def render(self, task: Task) -> Text:
        """Return the text for one task, such as `3.1 MB/18.1 MB`."""
        total = f"/{format_bytes(task.total)}" if task.total else ""
        return Text(format_bytes(task.completed) + total)


@contextmanager
def progress(description: str, total: float | None = None, unit: str = "") -> Iterator[ProgressBar]:
    """Show progress on standard error while the block runs.

    Args:
        description: what is being done, in a few words.
        total: how many units there are in all, if known.
        unit: the unit's name; `B` is shown in kB, MB and GB.

    Yields:
        A bar with `advance(amount, note)`.
    """
    bar = _RichBar(description, total, unit) if sys.stderr.isatty() else _LineBar(description, total, unit)
    with bar as running:
        yield running


def print_table(
    title: str, rows: Mapping[str, object] | Sequence[Sequence[object]], header: Sequence[str] = ()
) -> None:
    """Print a table on standard output.

    Args:
        title: shown above the table.
        rows: a mapping from name to value, or rows of cells.
        header: the columns' names; without them the table has none.
    """
    table = Table(title=title, title_justify="left", show_header=bool(header))
    body = [list(item) for item in rows.items()] if isinstance(rows, Mapping) else [list(row) for row in rows]
    width = max([len(header), *(len(row) for row in body)], default=0)
    for index in range(width):
        numeric = index > 0
        table.add_column(header[index] if index < len(header) else "", justify="right" if numeric else "left")
    for row in body:
        table.add_row(*(_cell(cell) for cell in row))
    # Piped output keeps whole rows: a table folded at 80 columns is of no use to grep.
    width_of_pipe = None if sys.stdout.isatty() else 160
    Console(width=width_of_pipe, markup=False, highlight=False).print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value)


_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


class ByteSize(click.ParamType[int]):
    """A number of bytes, such as 20000000, 20MB (decimal) or 16MiB (binary)."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is no number of bytes; write 20000000, 20MB or 16MiB", param, ctx)
        size = int(float(match[1]) * _UNITS[match[2]])
        if size < 1:
            self.fail("must be at least one byte", param, ctx)
        return size


def format_bytes(amount: float) -> str:
    """Return a number of bytes in decimal units, such as `18.1 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(amount) < 1000 or unit == "TB":
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable: the loop returns at TB")


def fail(message: str) -> NoReturn:
    """Print one sentence on standard error and exit with status 1."""
    click.echo(f"error: {message}", err=True)
    sys.exit(EXIT_BAD_INPUT)


def sentence_of(error: BaseException) -> str:
    """Return an exception's message as one line for a user."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        mend = _MENDS.get(error.errno or 0)
        return f"{where}{error.strerror}{f'; {mend}' if mend else ''}"
    return " ".join(str(error).split()) or type(error).__name__


def friendly_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that bad input ends it with one sentence and status 1, not a traceback.

    Caught are `ValueError` (the packages' own input errors derive from it), `OSError`, `MemoryError`, Arrow's errors,
    and an interrupt from the keyboard (status 130). `BLT_TRACEBACK=1` in the environment lets everything through, for
    those who develop the packages.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if os.environ.get("BLT_TRACEBACK"):
            return command(*args, **kwargs)
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            # The reader (head, less) has gone: nothing is wrong, and nothing more can be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to go on", err=True)
            sys.exit(130)
        except MemoryError as error:
            fail(f"there is too little memory ({sentence_of(error)}); give smaller sizes or use a larger machine")
        except (ValueError, OSError, pa.ArrowException) as error:
            log.debug("command failed", exc_info=True)
            fail(sentence_of(error))

    return wrapped
