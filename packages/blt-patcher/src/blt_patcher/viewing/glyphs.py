"""Bytes as something to look at: characters where they are UTF-8 text, hexadecimal numbers where they are not."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class GlyphKind(StrEnum):
    """What a glyph stands for, which decides how it is drawn."""

    TEXT = "text"
    """A character that shows itself."""
    MARK = "mark"
    """A combining mark, shown on a dotted circle, since the letter it belongs to may be in another patch."""
    SPACE = "space"
    """A space, tab, or line break, shown as a sign."""
    CODE = "code"
    """A character that shows nothing by itself (joiners, direction marks), shown as a name or code point."""
    HEX = "hex"
    """A byte that is no text, in hexadecimal."""


@dataclass(frozen=True, slots=True)
class Glyph:
    """What stands for one character, or for one byte that belongs to none."""

    start: int
    """Its first byte, counted from the beginning of what was split."""
    end: int
    """The byte after its last."""
    label: str
    """What to show, never empty and free of control characters."""
    kind: GlyphKind


_SPACES: Final = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}

#: Characters without a picture that are frequent enough to have a known short name.
_NAMES: Final = {
    "\u00a0": "NBSP",
    "\u00ad": "SHY",
    "\u061c": "ALM",
    "\u200b": "ZWSP",
    "\u200c": "ZWNJ",
    "\u200d": "ZWJ",
    "\u200e": "LRM",
    "\u200f": "RLM",
    "\u202f": "NNBSP",
    "\u2060": "WJ",
    "\u3000": "IDSP",
    "\ufe0e": "VS15",
    "\ufe0f": "VS16",
    "\ufeff": "BOM",
}

#: What a combining mark is shown on.
DOTTED_CIRCLE: Final = "◌"


def split_glyphs(data: bytes) -> list[Glyph]:
    """Split bytes into whole characters where there are any, and single bytes elsewhere.

    Args:
        data: any bytes; a character cut by the beginning or the end counts as bytes.

    Returns:
        Glyphs that cover the bytes without gap or overlap, in order.
    """
    glyphs = []
    position = 0
    while position < len(data):
        character = _character(data, position)
        width = len(character.encode()) if character is not None else 1
        label, kind = (f"{data[position]:02x}", GlyphKind.HEX) if character is None else _appearance(character)
        glyphs.append(Glyph(position, position + width, label, kind))
        position += width
    return glyphs


def _character(data: bytes, position: int) -> str | None:
    """Return the character that begins at a byte, or None where there is none or it is an ASCII control."""
    first = data[position]
    if first < 0x80:
        character = chr(first)
        return character if character.isprintable() or character in _SPACES else None
    width = 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 0
    try:
        return data[position : position + width].decode("utf-8") or None
    except UnicodeDecodeError:
        return None


def _appearance(character: str) -> tuple[str, GlyphKind]:
    """Return how a character is shown."""
    if character in _SPACES:
        return _SPACES[character], GlyphKind.SPACE
    if character in _NAMES:
        return _NAMES[character], GlyphKind.CODE
    if not character.isprintable():
        return code_point(character), GlyphKind.CODE
    if unicodedata.category(character).startswith("M"):
        return DOTTED_CIRCLE + character, GlyphKind.MARK
    return character, GlyphKind.TEXT


def code_point(character: str) -> str:
    """Return a character's number in the usual form, such as `U+0939`."""
    return f"U+{ord(character):04X}"


def printable(text: str) -> str:
    r"""Return a text with whatever a terminal would obey or not show as escapes such as `\x1b`: for names and ids."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
