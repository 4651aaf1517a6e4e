"""Pages: one HTML file with nothing outside itself, a title, figures and tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

from blt_patcher.figures.canvas import Drawing
from blt_patcher.figures.svg import colour_rules, to_svg
from blt_patcher.outputs import write_file

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#667085;--line:#e4e7ec;--paper:#fff;--card:#f8f9fb}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2b3240;--paper:#12161f;--card:#1a202c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:2rem 1.5rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.12rem;margin:2.2rem 0 .6rem;overflow-wrap:anywhere}
p.lead,p.note{color:var(--soft);margin:.1rem 0 1rem;max-width:52rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(11.5rem,1fr));gap:.7rem;margin:1.2rem 0}
dl div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.6rem .85rem;min-width:0}
dt{color:var(--soft);font-size:.82rem}
dd{margin:.1rem 0 0;font-size:1.05rem;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
figure{margin:0 0 1rem;overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.6rem 0}
td,th{border-bottom:1px solid var(--line);padding:.28rem 0 .28rem 1.6rem;text-align:right}
th{color:var(--soft);font-weight:500}
td:first-child,th:first-child{text-align:left;padding-left:0}
tr.chosen td{font-weight:700}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of a page."""

    heading: str = ""
    """Empty for none."""
    note: str = ""
    """A sentence or two under the heading."""
    drawings: Sequence[Drawing] = ()
    header: Sequence[str] = ()
    """Names of the table's columns."""
    rows: Sequence[Sequence[str]] = ()
    """A table, if any."""
    chosen_row: int | None = field(default=None)
    """The row of the table that stands out."""


def html_page(title: str, lead: str, figures: Mapping[str, object], sections: Sequence[Section]) -> str:
    """Return a page.

    Args:
        title: the page's title.
        lead: what it shows, in a sentence or two.
        figures: name to value, shown at the top; whole numbers get thousands separators.
        sections: what follows.
    """
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_value(value))}</dd></div>" for name, value in figures.items()
    )
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{colour_rules()}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n<dl>{cards}</dl>\n{body}\n</body>\n</html>\n'
    )


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Write a page, atomically; an existing file is replaced.

    Raises:
        InputError: the path is a directory, or its directory is missing.
        OSError: the file cannot be written.
    """
    write_file(path, page.encode("utf-8", errors="replace"))


def write_svg(path: str | os.PathLike[str], drawing: Drawing) -> None:
    """Write a drawing as an SVG file, atomically; an existing file is replaced.

    Raises:
        InputError: the path is a directory, or its directory is missing.
        OSError: the file cannot be written.
    """
    write_page(path, to_svg(drawing) + "\n")


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"] if section.heading else []
    if section.note:
        parts.append(f'<p class="note">{escape(section.note)}</p>')
    parts += [f"<figure>{to_svg(drawing, standalone=False)}</figure>" for drawing in section.drawings]
    if section.rows:
        head = "".join(f"<th>{escape(name)}</th>" for name in section.header)
        rows = "".join(_row(row, number == section.chosen_row) for number, row in enumerate(section.rows))
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    return "\n".join(parts)


def _row(cells: Sequence[str], chosen: bool) -> str:
    opening = '<tr class="chosen">' if chosen else "<tr>"
    return opening + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _value(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
