"""What the subcommands that write patched shards tell at their end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from blt_data import Manifest
from blt_data.console import format_bytes, print_table
from blt_data.framing import FRAME_TOKENS
from blt_patcher.drift import drift_warning
from blt_patcher.precompute import PrecomputeResult
from blt_patcher.schemes import PatchScheme, describe_scheme


def print_result(
    title: str,
    output: Path,
    scheme: PatchScheme,
    result: PrecomputeResult,
    seconds: float,
    more: Mapping[str, object] | None = None,
) -> None:
    """Print the table about a finished directory, and a warning if its mean patch length is far from its target.

    Args:
        title: the table's title.
        output: the directory.
        scheme: how it was patched.
        result: what was done.
        seconds: how long it took.
        more: rows that only one of the subcommands has.
    """
    manifest = result.manifest
    patches = manifest.patches or 0
    tokens = manifest.bytes + FRAME_TOKENS * manifest.documents
    rows: dict[str, object] = {
        "output": str(output),
        "scheme": describe_scheme(scheme),
        "shards": len(manifest.shards),
        "of these already there": result.resumed_shards,
        "documents": manifest.documents,
        "bytes": format_bytes(manifest.bytes),
        "patches": patches,
        "mean patch length": f"{tokens / patches:.4f}" if patches else "no patches",
        "seconds": f"{seconds:.1f}",
    }
    if not result.resumed_shards and seconds > 0:
        rows["speed"] = f"{format_bytes(manifest.bytes / seconds)}/s"
    print_table(title, rows | dict(more or {}))
    if not result.missing_shards:
        warn_of_drift(manifest)


def warn_of_drift(manifest: Manifest) -> None:
    """Say so on standard error if a directory's mean patch length is far from its target."""
    if warning := drift_warning(manifest):
        click.echo(f"warning: {warning}", err=True)
