"""Patches on a terminal: bands of colour, or separators where there is no colour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from blt_patcher.viewing.glyphs import Glyph, GlyphKind, split_glyphs
from blt_patcher.viewing.view import PatchView, ShownPatch

#: Stands before every patch but the first where there is no colour.
SEPARATOR: Final = "│"

#: Patches take these in turn; dark writing on a light ground is readable on dark and light terminals alike.
_BANDS: Final = (("#14233a", "#a9c8ee"), ("#3a2010", "#f6c9a3"))
_FAINT: Final = ("#4d6a92", "#96643c")

#: What stands for tokens that are no bytes.
_BOS, _EOS = "⟨BOS⟩", "⟨EOS⟩"


def render_patches(view: PatchView, *, colour: bool, width: int | None = None) -> list[Text]:
    r"""Return a document's patches as lines of text.

    Bytes that are no text stand as `\xe6`, characters that show nothing as `⟨ZWJ⟩`; a character that a boundary cuts is
    shown byte by byte. Line breaks are shown (`↵`) and followed.

    Args:
        view: the document.
        colour: mark patches by alternating grounds, else by a separator.
        width: columns to fold lines at; None folds nowhere but at the text's own line breaks.

    Returns:
        The lines, styled if `colour`.
    """
    lines = [Text()]
    used = 0
    for label, style in _pieces(view, colour):
        breaks = label.endswith("\n")
        shown = label.removesuffix("\n")
        cells = cell_len(shown)
        if width is not None and used and used + cells > width:
            lines.append(Text())
            used = 0
        lines[-1].append(shown, style)
        used += cells
        if breaks:
            lines.append(Text())
            used = 0
    return lines if len(lines[-1]) else lines[:-1]


def _pieces(view: PatchView, colour: bool) -> Iterator[tuple[str, Style | None]]:
    """Yield what is shown, a glyph at a time, each with its style; a line break ends its piece with a new line."""
    first, _ = view.window
    content, low = view.shown_content, first + 1
    tokens = view.content.size + 2
    for number, patch in enumerate(view.patches()):
        plain, faint = _styles(patch) if colour else (None, None)
        opening = SEPARATOR if number and not colour else ""
        pieces: list[tuple[str, Style | None]] = [(_BOS, faint)] if patch.start == 0 else []
        for glyph in split_glyphs(content[max(patch.start, 1) - low : max(patch.end - low, 0)]):
            at_beginning = not pieces
            pieces.append((_text_of(glyph, at_beginning), plain if _shows_itself(glyph) else faint))
        if patch.end == tokens:
            pieces.append((_EOS, faint))
        for place, (label, style) in enumerate(pieces):
            yield (opening + label if place == 0 else label), style


def _styles(patch: ShownPatch) -> tuple[Style, Style]:
    """Return the styles of a patch: for text, and for what stands for something else."""
    parity = patch.index % 2
    ink, ground = _BANDS[parity]
    return Style(color=ink, bgcolor=ground), Style(color=_FAINT[parity], bgcolor=ground)


def _shows_itself(glyph: Glyph) -> bool:
    return glyph.kind in (GlyphKind.TEXT, GlyphKind.MARK)


def _text_of(glyph: Glyph, at_beginning: bool) -> str:
    """Return a glyph as a terminal shows it."""
    match glyph.kind:
        case GlyphKind.HEX:
            return f"\\x{glyph.label}"
        case GlyphKind.SPACE:
            return {"␣": " ", "↵": "↵\n"}.get(glyph.label, glyph.label)
        case GlyphKind.CODE:
            return f"⟨{glyph.label}⟩"
        case GlyphKind.MARK:
            # Within a patch the mark joins its letter; at a patch's beginning it would join the separator.
            return glyph.label if at_beginning else glyph.label[1:]
        case GlyphKind.TEXT:
            return glyph.label
