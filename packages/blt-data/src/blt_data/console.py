"""What the command lines of all packages share: progress, tables, and errors told in one sentence.

Progress and messages go to standard error, results to standard output, so that output can be piped. When standard
error is no terminal, a progress bar becomes one line a minute.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, ParamSpec, TypeVar

import click
import pyarrow as pa
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from blt_data.progress import JobProgress, ProgressBar, progress
from blt_data.skips import SkipCount
from blt_data.units import ByteSize, format_bytes, format_duration

__all__ = [
    "EXIT_BAD_INPUT",
    "ByteSize",
    "JobProgress",
    "ProgressBar",
    "discard_output",
    "fail",
    "format_bytes",
    "format_duration",
    "friendly_errors",
    "print_skips",
    "print_table",
    "progress",
    "sentence_of",
]

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

#: Exit status for bad input, as opposed to 2, which click uses for a misspelt command line.
EXIT_BAD_INPUT = 1

#: Columns of a table that is piped, if its rows need no more, and the most that they get.
_PIPE_WIDTH = 160
_WIDEST = 10_000

#: What stands on the right of its column: figures, also with a unit.
_LIKE_A_NUMBER = re.compile(r"[<~]?-?[0-9][0-9.,e+-]*(%| ?[a-zA-Z]{1,2})?$")

#: What a user can do about the system's errors.
_MENDS = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space and run the same command again"
) | dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions or name another path")


class _Console(Console):
    """A console that leaves it to `friendly_errors` what a reader that has gone (head, less) means."""

    def on_broken_pipe(self) -> None:
        """Let the error through; rich would end the program with status 1."""
        raise BrokenPipeError


def print_table(
    title: str, rows: Mapping[str, object] | Sequence[Sequence[object]], header: Sequence[str] = ()
) -> None:
    """Print a table on standard output.

    Args:
        title: shown above the table.
        rows: a mapping from name to value, or rows of cells.
        header: the columns' names; without them the table has none.
    """
    table = Table(show_header=bool(header))
    body = [list(item) for item in rows.items()] if isinstance(rows, Mapping) else [list(row) for row in rows]
    cells = [[_cell(cell) for cell in row] for row in body]
    width = max([len(header), *(len(row) for row in body)], default=0)
    for index in range(width):
        column = [row[index] for row in cells if index < len(row) and row[index]]
        numeric = index > 0 and all(_LIKE_A_NUMBER.match(cell) for cell in column)
        table.add_column(header[index] if index < len(header) else "", justify="right" if numeric else "left")
    for row in cells:
        table.add_row(*row)
    console = _Console(markup=False, highlight=False)
    if not sys.stdout.isatty():
        # Piped output keeps whole rows: a table folded at 80 columns is of no use to grep.
        widest = Measurement.get(console, console.options.update(width=_WIDEST), table).maximum
        console = _Console(width=max(_PIPE_WIDTH, widest), markup=False, highlight=False)
    # Not as the table's own title, which would be folded at the table's width.
    console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(table)


def print_skips(skips: Mapping[str, SkipCount], title: str = "skipped") -> None:
    """Print what was left out and why on standard output, with a total; nothing if there is nothing to tell.

    Args:
        skips: reason to number and bytes.
        title: shown above the table.
    """
    rows: list[tuple[object, ...]] = [
        (reason, skipped.count, skipped.bytes, format_bytes(skipped.bytes)) for reason, skipped in skips.items()
    ]
    if len(rows) > 1:
        total = sum(skipped.bytes for skipped in skips.values())
        rows.append(("total", sum(skipped.count for skipped in skips.values()), total, format_bytes(total)))
    if rows:
        print_table(title, rows, ("reason", "number", "bytes", ""))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value)


def fail(message: str) -> NoReturn:
    """Print one sentence on standard error and exit with status 1."""
    click.echo(f"error: {message}", err=True)
    sys.exit(EXIT_BAD_INPUT)


def discard_output() -> None:
    """Let standard output go nowhere from now on, as nobody reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        # What the terminal's encoding cannot show (a file name that is no UTF-8, say) is escaped.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            # The reader (head, less) has gone: nothing is wrong.
            discard_output()
            sys.exit(0)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to go on", err=True)
            sys.exit(130)
        except RecursionError:
            fail("the input is nested too deeply")
        except MemoryError as error:
            fail(f"there is too little memory ({sentence_of(error)}); give smaller sizes or use a larger machine")
        except (ValueError, OSError, pa.ArrowException) as error:
            log.debug("command failed", exc_info=True)
            fail(sentence_of(error))

    return wrapped
