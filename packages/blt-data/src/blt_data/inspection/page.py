"""An inspection as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from blt_data.console import format_bytes
from blt_data.inspection.collect import Inspection, Share
from blt_data.inspection.terminal import percent
from blt_data.shards.files import atomic_file

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --bar: #0969da; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --bar: #4493f8; --page: #0d1117; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2rem; font-size: 1.15rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .7rem; border-bottom: 1px solid var(--line); }
th { text-align: left; color: var(--soft); font-weight: 500; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
td { overflow-wrap: anywhere; } svg { display: block; } rect { fill: var(--bar); }
p.soft { color: var(--soft); } pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  border-radius: 6px; padding: .5rem .7rem; margin: .2rem 0 1rem; }
""".strip()

_BAR_WIDTH: Final = 240


def write_page(path: Path, inspections: Sequence[Inspection]) -> None:
    """Write inspections to one page, atomically.

    Args:
        path: the file to write.
        inspections: of one or more directories.

    Raises:
        OSError: it cannot be written.
    """
    body = "\n".join(part for inspection in inspections for part in _sections(inspection))
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(_title(inspections))}</title>\n"
        f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    with atomic_file(path) as file:
        file.write(page.encode())


def _title(inspections: Sequence[Inspection]) -> str:
    return ", ".join(str(inspection.path) for inspection in inspections)


def _sections(inspection: Inspection) -> Iterable[str]:
    manifest = inspection.manifest
    yield f"<h1>{_text(inspection.path)}</h1>"
    patched = manifest.patches is not None
    totals = (
        f"{len(manifest.shards):,} shards of kind {manifest.kind}: {manifest.documents:,} documents, "
        f"{manifest.bytes:,} bytes of content, "
        f"{format_bytes(sum(entry.file_bytes for entry in manifest.shards))} of files"
    )
    if inspection.mean_patch is not None:
        totals += f"; {manifest.patches:,} patches of {inspection.mean_patch:.3f} framed tokens on average"
    yield f"<p>{_text(totals)}.</p>"
    if inspection.documents:
        yield f'<p class="soft">The figures of content are those of a sample, {_text(inspection.sample)}.</p>'
        yield "<h2>Document length</h2>"
        yield _table(
            [(name, f"{value:,.1f}".removesuffix(".0")) for name, value in inspection.quantiles], ("", "bytes")
        )
        yield _lengths(inspection)
        yield "<h2>Sources</h2>" + _shares(inspection.sources, "documents")
        yield "<h2>Scripts and characters</h2>" + _shares(inspection.scripts, "characters")
    if inspection.shown:
        yield "<h2>Sample documents</h2>"
        for document in inspection.shown:
            patches = "" if document.patches is None else f", {document.patches:,} patches"
            yield (
                f"<div><strong>{_text(document.document_id)}</strong> "
                f"({_text(document.source)}, {document.bytes:,} bytes{patches})</div>"
                f"<pre>{_text(document.text)}{'…' if document.cut else ''}</pre>"
            )
    if manifest.skipped:
        yield "<h2>Skipped</h2>"
        rows = [(reason, f"{skip.count:,}", f"{skip.bytes:,}") for reason, skip in manifest.skipped.items()]
        yield _table(rows, ("reason", "number", "bytes"))
    yield "<h2>Columns</h2>" + _table(inspection.columns, ("column", "Arrow type"), numbers=False)
    yield "<h2>Provenance</h2>" + _table(list(inspection.facts.items()), ("", ""), numbers=False)
    yield "<h2>Shards</h2>"
    shards = [
        (
            entry.name,
            f"{entry.documents:,}",
            f"{entry.bytes:,}",
            *([f"{entry.patches:,}"] if patched else []),
            format_bytes(entry.file_bytes),
        )
        for entry in manifest.shards
    ]
    yield _table(shards, ("shard", "documents", "bytes", *(["patches"] if patched else []), "file"))


def _lengths(inspection: Inspection) -> str:
    most = max(item.documents for item in inspection.lengths)
    rows = [
        (
            f"{item.first:,}" if item.first == item.last else f"{item.first:,} to {item.last:,}",
            _Bar(item.documents / most),
            f"{item.documents:,}",
            percent(item.documents, inspection.documents),
            percent(item.bytes, inspection.bytes),
        )
        for item in inspection.lengths
    ]
    return _table(rows, ("bytes", "", "documents", "of documents", "of bytes"))


def _shares(shares: Sequence[Share], noun: str) -> str:
    count, size = sum(share.count for share in shares), sum(share.bytes for share in shares)
    most = max((share.bytes for share in shares), default=0)
    rows = [
        (
            share.name,
            _Bar(share.bytes / max(1, most)),
            f"{share.bytes:,}",
            percent(share.bytes, size),
            f"{share.count:,}",
            percent(share.count, count),
        )
        for share in shares
    ]
    return _table(rows, ("", "", "bytes", "of bytes", noun, f"of {noun}"))


class _Bar:
    """A cell that is drawn."""

    def __init__(self, share: float) -> None:
        self.width = max(0.0, min(1.0, share)) * _BAR_WIDTH

    def __str__(self) -> str:
        return (
            f'<svg width="{_BAR_WIDTH}" height="14" role="img" '
            f'aria-label="{self.width / _BAR_WIDTH:.0%} of the longest bar">'
            f'<rect width="{self.width:.1f}" height="14" rx="2"/></svg>'
        )


def _table(rows: Sequence[Sequence[object]], header: Sequence[str], *, numbers: bool = True) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "\n".join(
        "<tr>" + "".join(_cell(cell, number=numbers and index > 0) for index, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _cell(cell: object, *, number: bool) -> str:
    if isinstance(cell, _Bar):
        return f"<td>{cell}</td>"
    kind = ' class="n"' if number else ""
    return f"<td{kind}>{_text(cell)}</td>"


def _text(value: object) -> str:
    """Return text for HTML; what UTF-8 cannot say (of a file's name) is escaped."""
    return escape(str(value).encode("utf-8", errors="backslashreplace").decode())
