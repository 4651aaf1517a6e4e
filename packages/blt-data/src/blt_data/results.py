"""What a run of `prepare` left, as tables for people."""

from __future__ import annotations

import click

from blt_data.console import format_bytes, print_skips, print_table
from blt_data.ingest import PrepareResult


def print_result(result: PrepareResult) -> None:
    """Print what was written, what each step of the user's did, and what was left out.

    Args:
        result: of `prepare` or of a pipeline's `run`.
    """
    for shortage in result.shortages:
        click.echo(shortage, err=True)
    title = "prepared"
    if result.already_complete:
        click.echo("already complete, nothing to do", err=True)
    else:
        total = sum(manifest.bytes for manifest in result.manifests.values())
        speed = total / 1e6 / max(result.seconds, 1e-9)
        title = f"prepared {format_bytes(total)} in {result.seconds:.1f} s ({speed:,.1f} MB/s)"
    rows = [
        (path, manifest.documents, manifest.bytes, len(manifest.shards)) for path, manifest in result.manifests.items()
    ]
    print_table(title, rows, ("directory", "documents", "bytes", "shards"))
    if result.steps:
        print_table(
            "steps",
            [
                (step.name, step.documents_in, step.documents_out, step.bytes_in, step.bytes_out)
                for step in result.steps
            ],
            ("step", "documents in", "documents out", "bytes in", "bytes out"),
        )
    print_skips(next(iter(result.manifests.values())).skipped)
