"""Patches on a terminal: bands of colour, or separators where there is no colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from blt_patcher.viewing.glyphs import Glyph, GlyphKind, split_glyphs
from blt_patcher.viewing.view import PatchView, ShownToken

#: Stands before every patch but the first where there is no colour.
SEPARATOR: Final = "│"

#: Stands after a character, once for every patch that starts inside it, where there is no colour.
INNER_SEPARATOR: Final = "┊"


@dataclass(frozen=True, slots=True)
class Band:
    """How a patch is coloured."""

    text: Style
    """For what stands for itself."""
    stand_in: Style
    """For what stands for something else: bytes, spaces, BOS."""


#: Bands that patches take in turn, for each of rich's colour systems; dark writing on a light ground is readable on
#: dark and light terminals alike.
PALETTES: Final[Mapping[str, tuple[Band, Band]]] = {
    "standard": (
        Band(Style.parse("black on cyan"), Style.parse("blue on cyan")),
        Band(Style.parse("black on yellow"), Style.parse("red on yellow")),
    ),
    "256": (
        Band(Style.parse("color(235) on color(153)"), Style.parse("color(67) on color(153)")),
        Band(Style.parse("color(235) on color(223)"), Style.parse("color(137) on color(223)")),
    ),
    "truecolor": (
        Band(Style.parse("#14233a on #a9c8ee"), Style.parse("#4d6a92 on #a9c8ee")),
        Band(Style.parse("#3a2010 on #f6c9a3"), Style.parse("#96643c on #f6c9a3")),
    ),
}

_CUT: Final = Style(underline=True)

#: What stands for tokens that are no bytes.
_BOS, _EOS = "⟨BOS⟩", "⟨EOS⟩"


def render_patches(
    view: PatchView, *, palette: tuple[Band, Band] | None = None, width: int | None = None
) -> list[Text]:
    r"""Return a document's patches as lines of text.

    Bytes that are no text stand as `\xe6`, characters that show nothing as `⟨ZWJ⟩`; line breaks are shown (`↵`) and
    followed. A character is shown whole, in the patch of its first byte; where another patch starts inside it, it is
    underlined, or followed by a separator of its own kind.

    Args:
        view: the document.
        palette: the bands that patches take in turn; without one they are separated by `│`, and by `┊` inside a
            character.
        width: columns to fold lines at; None folds nowhere but at the text's own line breaks.

    Returns:
        The lines, styled if there is a palette.
    """
    lines = [Text()]
    used = 0
    for label, style in _pieces(view, palette):
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


def _pieces(view: PatchView, palette: tuple[Band, Band] | None) -> Iterator[tuple[str, Style | None]]:
    """Yield what is shown, a glyph at a time, each with its style; a line break ends its piece with a new line."""
    tokens = view.tokens()
    first, last = view.token_window
    if first == 0:
        yield _BOS, palette[0].stand_in if palette else None
    offset = max(first, 1) - first
    inner = 0
    for glyph in split_glyphs(view.shown_content):
        own = tokens[offset + glyph.start : offset + glyph.end]
        label = _text_of(glyph, own[0].starts or inner > 0)
        inner = sum(token.starts for token in own[1:])
        if palette is None:
            opening = SEPARATOR if own[0].starts and own[0].token > first else ""
            ending = INNER_SEPARATOR * inner
            yield opening + (label[:-1] + ending + "\n" if label.endswith("\n") else label + ending), None
        else:
            yield label, _style(glyph, own[0], palette) + (_CUT if inner else Style())
    if last == view.content.size + 2:
        opening = SEPARATOR if tokens[-1].starts and palette is None else ""
        yield opening + _EOS, palette[tokens[-1].patch % 2].stand_in if palette else None


def _style(glyph: Glyph, token: ShownToken, palette: tuple[Band, Band]) -> Style:
    band = palette[token.patch % 2]
    return band.text if glyph.kind in (GlyphKind.TEXT, GlyphKind.MARK) else band.stand_in


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
