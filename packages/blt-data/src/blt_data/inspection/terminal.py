"""An inspection in the terminal: tables with bars."""

from __future__ import annotations

import sys

import click

from blt_data.console import format_bytes, print_skips, print_table
from blt_data.inspection.collect import Inspection, Share
from blt_data.shards.schema import ENTROPIES

_BAR_WIDTH = 24

#: Shards that are listed one by one; more are only summed.
_LISTED_SHARDS = 20


def print_inspection(inspection: Inspection) -> None:
    """Print figures, schema, provenance, histogram, mix and sample documents on standard output.

    Args:
        inspection: what to print.
    """
    manifest = inspection.manifest
    _print_shards(inspection)
    if inspection.columns:
        print_table("columns", inspection.columns)
    print_table("provenance", inspection.facts)
    print_skips(manifest.skipped)
    if not inspection.documents:
        return
    click.echo(f"\nsample: {inspection.sample}\n")
    print_table(
        "document length in bytes", [(name, f"{value:,.1f}".removesuffix(".0")) for name, value in inspection.quantiles]
    )
    most = max(item.documents for item in inspection.lengths)
    print_table(
        "documents by length",
        [
            (
                f"{item.first:,}" if item.first == item.last else f"{item.first:,} to {item.last:,}",
                bar(item.documents / most),
                item.documents,
                percent(item.documents, inspection.documents),
                percent(item.bytes, inspection.bytes),
            )
            for item in inspection.lengths
        ],
        ("bytes", "", "documents", "of documents", "of bytes"),
    )
    _print_shares("sources", "documents", inspection.sources)
    _print_shares("scripts and characters", "characters", inspection.scripts)
    for document in inspection.shown:
        patches = "" if document.patches is None else f", {document.patches:,} patches"
        click.echo(f"\n{document.document_id}  ({document.source}, {document.bytes:,} bytes{patches})")
        click.echo(f"  {document.text}{'…' if document.cut else ''}")
    click.echo("")


def _print_shards(inspection: Inspection) -> None:
    manifest = inspection.manifest
    patched = manifest.patches is not None
    rows: list[tuple[object, ...]] = []
    if len(manifest.shards) <= _LISTED_SHARDS:
        rows = [
            (
                entry.name,
                entry.documents,
                entry.bytes,
                *([entry.patches] if patched else []),
                format_bytes(entry.file_bytes),
            )
            for entry in manifest.shards
        ]
    total = sum(entry.file_bytes for entry in manifest.shards)
    rows.append(
        (
            f"{len(manifest.shards):,} shards",
            manifest.documents,
            manifest.bytes,
            *([manifest.patches] if patched else []),
            format_bytes(total),
        )
    )
    header = ("shard", "documents", "bytes", *(["patches"] if patched else []), "file")
    print_table(f"{inspection.path} (kind: {manifest.kind})", rows, header)
    if inspection.mean_patch is not None:
        keeps = any(name == ENTROPIES for name, _ in inspection.columns)
        click.echo(f"mean patch: {inspection.mean_patch:.3f} framed tokens; {'with' if keeps else 'without'} entropies")


def _print_shares(title: str, noun: str, shares: tuple[Share, ...]) -> None:
    count, size = sum(share.count for share in shares), sum(share.bytes for share in shares)
    most = max((share.bytes for share in shares), default=0)
    print_table(
        title,
        [
            (
                share.name,
                bar(share.bytes / max(1, most)),
                share.bytes,
                percent(share.bytes, size),
                share.count,
                percent(share.count, count),
            )
            for share in shares
        ],
        ("", "", "bytes", "of bytes", noun, f"of {noun}"),
    )


def percent(part: int, whole: int) -> str:
    """Return a share for a table: `12.3%`, and `<0.1%` for little that is not nothing."""
    share = 100 * part / max(1, whole)
    return "<0.1%" if 0 < share < 0.1 else f"{share:.1f}%"


def bar(share: float) -> str:
    """Return a bar of up to 24 characters, in eighths where the output can show them.

    Args:
        share: 0 to 1.
    """
    full, eighths = divmod(round(share * _BAR_WIDTH * 8), 8)
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return ("#" * (full + (eighths >= 4))).ljust(_BAR_WIDTH)
    return ("█" * full + " ▏▎▍▌▋▊▉"[eighths]).rstrip().ljust(_BAR_WIDTH)
