"""`blt-data merge`: join shard directories."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from blt_data.console import ByteSize, JobProgress, format_bytes, friendly_errors, print_skips, print_table
from blt_data.merging import MergeConfig, MergePlan, plan_merge, run_merge
from blt_data.merging.plan import Compression, complete_manifests, needs_reading
from blt_data.shards import Manifest, ShardEntry, read_manifest, shard_directories
from blt_data.units import NewDirectory


@click.command("merge", epilog="Example: blt-data merge data/2024 data/2025 --output data/both --compression zstd")
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIRECTORY...")
@click.option("--output", required=True, type=NewDirectory(), help="Directory to make.")
@click.option(
    "--compression",
    type=click.Choice(["none", "zstd"]),
    help="Write every shard anew, compressed or not.  [default: shards stay as they are]",
)
@click.option(
    "--shard-size",
    type=ByteSize(),
    help="Cut and join shards to at most this much content each; a larger document has a shard of its own.  "
    "[default: shards stay as they are]",
)
@click.option("--allow-duplicates", is_flag=True, help="Take a directory that is given twice twice.")
@click.option("--allow-mixed-splits", is_flag=True, help="Join held-out documents with others.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Shards that are read and written at once.  [default: as many as CPUs]",
)
@friendly_errors
def merge_command(
    directories: tuple[Path, ...],
    output: Path,
    compression: str | None,
    shard_size: int | None,
    allow_duplicates: bool,
    allow_mixed_splits: bool,
    workers: int | None,
) -> None:
    """Join directories of byte shards, or of shards patched alike, in the order in which they are named.

    Directories that hold train and holdout are joined split by split. Shards that need no change get a second name (a
    hard link) or, on another file system, are copied; they are not read. With --compression or --shard-size everything
    is read, verified and written anew. A merge that was killed goes on when the same command is given again.
    """
    config = MergeConfig(
        inputs=directories,
        output=output,
        compression=cast("Compression | None", compression),
        shard_bytes=shard_size,
        allow_duplicates=allow_duplicates,
        allow_mixed_splits=allow_mixed_splits,
        workers=workers,
    )
    plan = _plan(config)
    complete = complete_manifests(plan)
    with JobProgress("merging", total_bytes=plan.content_bytes, total_files=plan.shards, noun="shards") as job:

        def tell(entry: ShardEntry) -> None:
            job.advance(entry.bytes, entry.documents, entry.bytes, files=1)

        manifests = run_merge(plan, on_shard=tell)
        seconds = job.seconds
    if complete:
        click.echo("already complete, nothing to do", err=True)
    _print_result(manifests, "merged" if complete else f"merged in {seconds:.1f} s")


def _plan(config: MergeConfig) -> MergePlan:
    if not needs_reading(config):
        return plan_merge(config)
    entries = [
        entry for given in config.inputs for path in shard_directories(given) for entry in read_manifest(path).shards
    ]
    total = sum(entry.file_bytes for entry in entries)
    with JobProgress("verifying", total_bytes=total, total_files=len(entries), noun="shards") as job:

        def tell(amount: int, entry: ShardEntry | None) -> None:
            job.advance(amount, entry.documents if entry else 0, amount, files=1 if entry else 0)

        return plan_merge(config, on_progress=tell)


def _print_result(manifests: dict[Path, Manifest], title: str) -> None:
    rows = [
        (
            path,
            str(manifest.kind),
            len(manifest.shards),
            manifest.documents,
            manifest.bytes,
            format_bytes(sum(entry.file_bytes for entry in manifest.shards)),
        )
        for path, manifest in manifests.items()
    ]
    print_table(title, rows, ("directory", "kind", "shards", "documents", "bytes", "files"))
    for path, manifest in manifests.items():
        print_skips(manifest.skipped, f"skipped in {path}")
