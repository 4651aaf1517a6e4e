"""`blt-data prepare`: documents of a source to byte shards."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import click

from blt_data.console import ByteSize, ProgressBar, format_bytes, friendly_errors, print_table, progress
from blt_data.ingest import DEFAULT_SHARD_BYTES, PrepareConfig, PrepareResult, PrepareStart, prepare


@click.command(
    "prepare",
    epilog="Example: blt-data prepare --source fineweb-edu/sample/10BT --output data/bytes --holdout-fraction 0.01",
)
@click.option(
    "--source",
    required=True,
    help="A Parquet, JSON lines or text file, a directory of such files (searched recursively), a quoted glob, "
    "or python-stdlib: this Python's own standard library.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory to make.")
@click.option(
    "--holdout-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Hold out this share of the documents, by a hash of their id: writes OUTPUT/train and OUTPUT/holdout.",
)
@click.option(
    "--limit-bytes",
    type=ByteSize(),
    help="Take only the first documents, whole ones, up to this size (20MB, 1GiB); one worker reads them.",
)
@click.option(
    "--shard-size",
    type=ByteSize(),
    default=DEFAULT_SHARD_BYTES,
    help="Content per shard; a larger document has a shard of its own.  [default: 64MiB]",
)
@click.option("--text-column", default="text", show_default=True, help="Column or key that holds the text.")
@click.option(
    "--id-column",
    default="id",
    show_default=True,
    help="Column or key that holds the document's id; without one its id is path#row.",
)
@click.option("--source-name", help="What the shards call the source.  [default: the file's or directory's name]")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes; they change nothing but the time.  [default: as many as CPUs, fewer for little data]",
)
@friendly_errors
def prepare_command(
    source: str,
    output: Path,
    holdout_fraction: float | None,
    limit_bytes: int | None,
    shard_size: int,
    text_column: str,
    id_column: str,
    source_name: str | None,
    workers: int | None,
) -> None:
    """Write the documents of a source to a directory of byte shards.

    Every byte of every document is kept as it is in UTF-8. A run that was killed goes on where it was when the same
    command is given again, and its files are the same, byte for byte, as those of a run that was not.
    """
    config = PrepareConfig(
        source=source,
        output=output,
        holdout_fraction=holdout_fraction,
        limit_bytes=limit_bytes,
        shard_bytes=shard_size,
        text_column=text_column,
        id_column=id_column,
        source_name=source_name,
        workers=workers,
    )
    with _ProgressView(limit_bytes) as view:
        result = prepare(config, on_start=view.start, on_progress=view.advance)
    _print_result(result, view.seconds)


class _ProgressView(ExitStack):
    """Shows how far a run is, against the bytes to read or, if limited, the bytes to write."""

    def __init__(self, limit_bytes: int | None) -> None:
        super().__init__()
        self._limit = limit_bytes
        self._bar: ProgressBar | None = None
        self._documents = self._content = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since reading began."""
        return time.monotonic() - self._started

    def start(self, start: PrepareStart) -> None:
        """Say what will be read, and show a bar."""
        self._started = time.monotonic()
        click.echo(
            f"reading {start.files:,} {'file' if start.files == 1 else 'files'}, {format_bytes(start.source_bytes)}",
            err=True,
        )
        if start.tasks_discarded:
            click.echo(
                "an unfinished run with other parameters, files or package versions was there; "
                f"{start.tasks_discarded} of its tasks are done anew",
                err=True,
            )
        if start.tasks_resumed:
            click.echo(f"an earlier run finished {start.tasks_resumed} of {start.tasks} tasks; going on", err=True)
        total = start.source_bytes if self._limit is None else min(start.source_bytes, self._limit)
        self._bar = self.enter_context(progress("preparing", total=total, unit="B"))

    def advance(self, source_bytes: int, documents: int, content_bytes: int) -> None:
        """Move the bar."""
        self._documents += documents
        self._content += content_bytes
        if self._bar is not None:
            note = f"{self._documents:,} documents, {self._content / 1e6 / max(self.seconds, 1e-9):,.1f} MB/s"
            self._bar.advance(source_bytes if self._limit is None else content_bytes, note)


def _print_result(result: PrepareResult, seconds: float) -> None:
    if result.already_complete:
        click.echo("already complete, nothing to do", err=True)
    rows = [
        (path, manifest.documents, manifest.bytes, len(manifest.shards)) for path, manifest in result.manifests.items()
    ]
    title = "prepared"
    if not result.already_complete:
        total = sum(manifest.bytes for manifest in result.manifests.values())
        title = f"prepared {format_bytes(total)} in {seconds:.1f} s ({total / 1e6 / max(seconds, 1e-9):,.1f} MB/s)"
    print_table(title, rows, ("directory", "documents", "bytes", "shards"))
    skipped = next(iter(result.manifests.values())).skipped
    if skipped:
        print_table(
            "skipped",
            [(reason, skip.count, format_bytes(skip.bytes)) for reason, skip in skipped.items()],
            ("reason", "number", "bytes"),
        )
