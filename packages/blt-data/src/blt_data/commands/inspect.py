"""`blt-data inspect`: look into shard directories."""

from __future__ import annotations

from pathlib import Path

import click

from blt_data.console import friendly_errors
from blt_data.inspection import show_directory
from blt_data.shards import shard_directories


@click.command("inspect", epilog="Example: blt-data inspect data/bytes --documents 3")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--documents", type=click.IntRange(min=0), default=5, show_default=True, help="Documents to show.")
@click.option(
    "--preview-bytes", type=click.IntRange(min=1), default=60, show_default=True, help="Bytes to show of each."
)
@friendly_errors
def inspect_command(directory: Path, documents: int, preview_bytes: int) -> None:
    """Show the figures, the provenance and the first documents of a directory of byte or patched shards."""
    for path in shard_directories(directory):
        show_directory(path, documents=documents, preview_bytes=preview_bytes)
