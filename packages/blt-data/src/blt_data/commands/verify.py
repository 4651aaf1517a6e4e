"""`blt-data verify`: recompute every checksum of shard directories."""

from __future__ import annotations

from pathlib import Path

import click

from blt_data.console import (
    EXIT_BAD_INPUT,
    JobProgress,
    discard_output,
    format_bytes,
    friendly_errors,
    print_table,
    sentence_of,
)
from blt_data.cpus import available_cpus
from blt_data.errors import InputError
from blt_data.shards import Manifest, ShardEntry, read_manifest, shard_directories, verify_directory


@click.command("verify", epilog="Example: blt-data verify data/bytes --workers 8")
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIRECTORY...")
@click.option("--workers", type=click.IntRange(min=1), help="Shards that are read at once.  [default: as many as CPUs]")
@friendly_errors
def verify_command(directories: tuple[Path, ...], workers: int | None) -> None:
    """Recompute every checksum of directories of byte or patched shards.

    A directory is a shard directory, or one that holds train and holdout. Every problem is told, one line each; the
    exit status is 1 if there is any.
    """
    paths = list(dict.fromkeys(path for directory in directories for path in shard_directories(directory)))
    manifests: dict[Path, Manifest] = {}
    problems: list[str] = []
    for path in paths:
        try:
            manifests[path] = read_manifest(path)
        except (InputError, OSError) as error:
            problems.append(sentence_of(error))
    rows = []
    entries = [entry for manifest in manifests.values() for entry in manifest.shards]
    total = sum(entry.file_bytes for entry in entries)
    with JobProgress("verifying", total_bytes=total, total_files=len(entries), noun="shards") as job:

        def tell(amount: int, done: ShardEntry | None) -> None:
            job.advance(amount, done.documents if done else 0, amount, files=1 if done else 0)

        for path, manifest in manifests.items():
            found = verify_directory(path, workers=workers or available_cpus(), on_progress=tell)
            problems += found
            state = "right" if not found else f"{len(found):,} wrong"
            size = sum(entry.file_bytes for entry in manifest.shards)
            rows.append(
                (path, str(manifest.kind), len(manifest.shards), manifest.documents, manifest.bytes, size, state)
            )
        title = f"verified {format_bytes(total)} in {job.seconds:.1f} s"
    for problem in problems:
        click.echo(f"error: {problem}", err=True)
    try:
        if rows:
            print_table(title, rows, ("directory", "kind", "shards", "documents", "bytes", "file bytes", "checksums"))
    except BrokenPipeError:
        # Problems must not be lost with the reader of the table.
        discard_output()
    if problems:
        raise SystemExit(EXIT_BAD_INPUT)
