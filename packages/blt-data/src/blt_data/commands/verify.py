"""`blt-data verify`: recompute every checksum of shard directories."""

from __future__ import annotations

from pathlib import Path

import click

from blt_data.console import EXIT_BAD_INPUT, friendly_errors
from blt_data.inspection import shard_directories
from blt_data.shards import read_manifest, verify_directory


@click.command("verify", epilog="Example: blt-data verify data/bytes")
@click.argument("directory", type=click.Path(path_type=Path))
@friendly_errors
def verify_command(directory: Path) -> None:
    """Recompute every checksum of a directory of byte or patched shards; exit 1 if any is wrong."""
    problems = []
    for path in shard_directories(directory):
        found = verify_directory(path)
        problems += found
        if not found:
            manifest = read_manifest(path)
            click.echo(
                f"{path}: every checksum is right ({manifest.kind}: {len(manifest.shards):,} shards, "
                f"{manifest.documents:,} documents, {manifest.bytes:,} bytes)"
            )
    for problem in problems:
        click.echo(f"error: {problem}", err=True)
    if problems:
        raise SystemExit(EXIT_BAD_INPUT)
