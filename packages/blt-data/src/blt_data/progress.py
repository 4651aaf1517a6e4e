"""Progress on standard error: a bar on a terminal, one line a minute in logs and pipes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Protocol, Self

import click
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
from rich.table import Column
from rich.text import Text

from blt_data.units import format_bytes, format_duration

#: Environment variable: seconds between lines of progress where standard error is no terminal.
INTERVAL_VARIABLE: Final = "BLT_PROGRESS_SECONDS"

#: Seconds between such lines where the variable does not say.
LINE_INTERVAL: Final = 60.0

#: Seconds over which the speed shown is averaged, and between its samples.
_WINDOW: Final = 60.0
_SAMPLE: Final = 1.0

#: Columns of a terminal on which a long bar leaves room for the words.
_WIDE: Final = 110


def line_interval() -> float:
    """Return the seconds between lines of progress where standard error is no terminal."""
    try:
        seconds = float(os.environ.get(INTERVAL_VARIABLE, ""))
    except ValueError:
        return LINE_INTERVAL
    return seconds if 0 < seconds < threading.TIMEOUT_MAX else LINE_INTERVAL


class ProgressBar(Protocol):
    """What a long task is given to tell how far it is."""

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Count `amount` more units as done; `note` is shown beside the bar."""


class JobProgress:
    """How far a job over files is: files, documents, speed and time left.

    Use it in a `with` block. `advance` has the signature of an executor's `Report`, so it can be handed to one as
    `on_progress`; it may be called from any thread and with negative amounts, which take back what a failed attempt
    had told. On a terminal a bar is drawn; elsewhere a line is written every minute (`BLT_PROGRESS_SECONDS` sets
    another number of seconds), also while nothing moves, so that a log shows a job that waits:

        preparing: 37%, 12/98 files, 1,234,567 documents, 45.6 MB/s, 0:03:12 left

    The speed is that of the content, and the time left that of the source bytes, both over the last minute.

    Args:
        description: what is being done, in a few words.
        total_bytes: source bytes in all, if known; the percentage and the time left are theirs.
        total_files: files in all, if known.
        noun: what the files are called, in the plural.
        done_bytes: source bytes that an earlier run has done: they count for the percentage, not for the speed.
        done_files: files that an earlier run has done.
    """

    def __init__(
        self,
        description: str,
        *,
        total_bytes: int | None = None,
        total_files: int | None = None,
        noun: str = "files",
        done_bytes: int = 0,
        done_files: int = 0,
    ) -> None:
        self._description, self._noun = description, noun
        self._total_bytes, self._total_files = total_bytes, total_files
        self._lock = threading.Lock()
        self._source = done_bytes
        self._files = done_files
        self._documents = self._content = 0
        self._started = time.monotonic()
        self._samples: deque[tuple[float, int, int]] = deque([(self._started, done_bytes, 0)])
        self._bar: _JobBar | None = None
        self._lines: _JobLines | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._samples = deque([(self._started, self._source, self._content)])
        if sys.stderr.isatty():
            self._bar = _JobBar(self._description, self)
        else:
            self._lines = _JobLines(self._description, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._lines is not None:
            self._lines.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the block was entered."""
        return time.monotonic() - self._started

    @property
    def share(self) -> float | None:
        """Share of the work that is done, 0 to 1; None if the whole is not known."""
        for done, total in ((self._source, self._total_bytes), (self._files, self._total_files)):
            if total:
                return min(1.0, max(0.0, done / total))
        return None

    def advance(self, source_bytes: int = 0, documents: int = 0, content_bytes: int = 0, *, files: int = 0) -> None:
        """Count what was done since the last call.

        Args:
            source_bytes: bytes of the source, against the total.
            documents: documents.
            content_bytes: bytes of content, of which the speed is shown.
            files: files that are done.
        """
        with self._lock:
            self._source += source_bytes
            self._documents += documents
            self._content += content_bytes
            self._files += files

    def say(self, message: str) -> None:
        """Print a line on standard error without breaking the bar."""
        if self._bar is not None:
            self._bar.say(message)
        else:
            click.echo(message, err=True)

    def status(self) -> str:
        """Return the state as one line, such as `37%, 12/98 files, 1,234 documents, 45.6 MB/s, 0:03:12 left`."""
        with self._lock:
            speed, left = self._pace()
            share, files, documents = self.share, self._files, self._documents
            read = f"{format_bytes(self._source)} read"
        of = "" if self._total_files is None else f"/{self._total_files:,}"
        pieces = [
            read if share is None else f"{int(100 * share)}%",
            f"{files:,}{of} {self._noun}" if files or of else "",
            f"{documents:,} documents",
            f"{speed / 1e6:,.1f} MB/s",
            "" if left is None else f"{format_duration(left)} left",
        ]
        return ", ".join(piece for piece in pieces if piece)

    def summary(self) -> str:
        """Return what was done, such as `1.2 GB in 0:00:31 (38.7 MB/s)`, over the whole time."""
        seconds = self.seconds
        return (
            f"{format_bytes(self._content)} in {format_duration(seconds)} "
            f"({self._content / 1e6 / max(seconds, 1e-9):,.1f} MB/s)"
        )

    def _pace(self) -> tuple[float, float | None]:
        """Return content bytes a second and the seconds left, if they can be told."""
        now = time.monotonic()
        if now - self._samples[-1][0] >= _SAMPLE:
            self._samples.append((now, self._source, self._content))
        # The oldest sample that is kept lies just outside the window.
        while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW:
            self._samples.popleft()
        then, source, content = self._samples[0]
        elapsed = max(now - then, 1e-9)
        rate = (self._source - source) / elapsed
        left = None
        if self._total_bytes is not None and rate > 0:
            left = max(0, self._total_bytes - self._source) / rate
        return max(0.0, (self._content - content) / elapsed), left


class _JobBar:
    """A bar on a terminal; it asks the job for its state as often as it is drawn."""

    def __init__(self, description: str, job: JobProgress) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24 if console.width >= _WIDE else 6),
            _StatusColumn(job),
            console=console,
            transient=True,
        )
        self._progress.add_task(description, total=None if job.share is None else 1.0)
        self._progress.start()

    def say(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


class _StatusColumn(ProgressColumn):
    """The job's state in words; it moves the bar, too, when it is drawn."""

    def __init__(self, job: JobProgress) -> None:
        # One line, whatever the terminal's width: more would make the display jump.
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._job = job

    def render(self, task: Task) -> Text:
        task.completed = self._job.share or 0.0
        return Text(self._job.status())


class _JobLines:
    """A thread that writes the job's state now and then."""

    def __init__(self, description: str, job: JobProgress) -> None:
        self._description, self._job = description, job
        self._interval = line_interval()
        self._written = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress lines", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._written = True
            self._write()

    def _write(self) -> None:
        click.echo(f"{self._description}: {self._job.status()}", err=True)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._written:
            self._write()


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
        self._interval = line_interval()
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
        if time.monotonic() - self._last >= self._interval:
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
    """Show progress of a task that is no job over files on standard error while the block runs.

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
