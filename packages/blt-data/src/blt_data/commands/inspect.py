"""`blt-data inspect`: look into shard directories."""

from __future__ import annotations

from pathlib import Path

import click

from blt_data.console import ByteSize, JobProgress, friendly_errors
from blt_data.inspection import inspect_directory, print_inspection, write_page
from blt_data.inspection.collect import DEFAULT_SAMPLE_BYTES
from blt_data.shards import read_manifest, shard_directories


@click.command("inspect", epilog="Example: blt-data inspect data/bytes --documents 3 --html data.html")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--documents", type=click.IntRange(min=0), default=5, show_default=True, help="Documents to show.")
@click.option(
    "--preview-bytes", type=click.IntRange(min=1), default=60, show_default=True, help="Bytes to show of each."
)
@click.option(
    "--sample-size",
    type=ByteSize(),
    default=DEFAULT_SAMPLE_BYTES,
    help="Content to look at: whole shards, drawn at random until they hold this much.  [default: 256MiB]",
)
@click.option(
    "--sample-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="What shards and documents are drawn with.",
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the same to this page, too.")
@friendly_errors
def inspect_command(
    directory: Path, documents: int, preview_bytes: int, sample_size: int, sample_seed: int, html: Path | None
) -> None:
    """Show what a directory of byte or patched shards holds.

    Figures of every shard, columns, provenance and what was skipped; and of a sample, whose size is told, the lengths
    of documents, the mix of sources and of scripts, and a few documents. The sample's checksums are verified.
    """
    paths = shard_directories(directory)
    # Whole shards are read, so that it may become a little more.
    total = sum(min(sample_size, read_manifest(path).bytes) for path in paths)
    with JobProgress("inspecting", total_bytes=total) as job:
        inspections = [
            inspect_directory(
                path,
                sample_bytes=sample_size,
                documents=documents,
                preview_bytes=preview_bytes,
                seed=sample_seed,
                on_progress=job.advance,
            )
            for path in paths
        ]
    for inspection in inspections:
        print_inspection(inspection)
    if html is not None:
        write_page(html, inspections)
        click.echo(f"written: {html}", err=True)
