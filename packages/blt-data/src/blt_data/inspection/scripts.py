"""The scripts that text is written in: shares of characters and bytes by Unicode script and kind of character.

Letters and marks are told apart by the blocks of the Unicode standard that are given to a script, everything else by
its general category. That differs from the standard's own script property in a few blocks that two scripts share,
which is of no weight for a share.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

#: First and last code point of the blocks of each script, from the block list of Unicode 16.
_BLOCKS: Final = {
    "Latin": (
        (0x0041, 0x02AF),
        (0x1D00, 0x1DBF),
        (0x1E00, 0x1EFF),
        (0x2C60, 0x2C7F),
        (0xA720, 0xA7FF),
        (0xAB30, 0xAB6F),
        (0xFB00, 0xFB06),
        (0xFF21, 0xFF5A),
    ),
    "Greek": ((0x0370, 0x03FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x0400, 0x052F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Armenian": ((0x0530, 0x058F), (0xFB13, 0xFB17)),
    "Hebrew": ((0x0590, 0x05FF), (0xFB1D, 0xFB4F)),
    "Arabic": ((0x0600, 0x06FF), (0x0750, 0x077F), (0x0870, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)),
    "Syriac": ((0x0700, 0x074F), (0x0860, 0x086F)),
    "Thaana": ((0x0780, 0x07BF),),
    "Devanagari": ((0x0900, 0x097F), (0xA8E0, 0xA8FF)),
    "Bengali": ((0x0980, 0x09FF),),
    "Gurmukhi": ((0x0A00, 0x0A7F),),
    "Gujarati": ((0x0A80, 0x0AFF),),
    "Odia": ((0x0B00, 0x0B7F),),
    "Tamil": ((0x0B80, 0x0BFF),),
    "Telugu": ((0x0C00, 0x0C7F),),
    "Kannada": ((0x0C80, 0x0CFF),),
    "Malayalam": ((0x0D00, 0x0D7F),),
    "Sinhala": ((0x0D80, 0x0DFF),),
    "Thai": ((0x0E00, 0x0E7F),),
    "Lao": ((0x0E80, 0x0EFF),),
    "Tibetan": ((0x0F00, 0x0FFF),),
    "Myanmar": ((0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)),
    "Ethiopic": ((0x1200, 0x139F), (0x2D80, 0x2DDF), (0xAB00, 0xAB2F)),
    "Canadian syllabics": ((0x1400, 0x167F), (0x18B0, 0x18FF)),
    "Khmer": ((0x1780, 0x17FF),),
    "Mongolian": ((0x1800, 0x18AF),),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xFFA0, 0xFFDC)),
    "Kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F)),
    "Han": (
        (0x2E80, 0x2FDF),
        (0x3005, 0x3007),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
        (0x20000, 0x3FFFF),
    ),
}

_OTHER_LETTERS: Final = "other letters and marks"
_DIGITS: Final = "digits and numbers"
_SPACE: Final = "white space"
_ASCII_SIGNS: Final = "ASCII punctuation and code signs"
_SIGNS: Final = "other punctuation and symbols"
_EMOJI: Final = "emoji and pictographs"
_CONTROL: Final = "control and format"
_UNASSIGNED: Final = "private or unassigned"
_INVALID: Final = "no UTF-8"

#: Names of the classes; a class is an index into it.
CLASSES: Final = (
    *_BLOCKS,
    _OTHER_LETTERS,
    _DIGITS,
    _SPACE,
    _ASCII_SIGNS,
    _SIGNS,
    _EMOJI,
    _CONTROL,
    _UNASSIGNED,
    _INVALID,
)

_EMOJI_RANGES: Final = ((0x2600, 0x27BF), (0x1F000, 0x1FAFF))
_CODE_POINTS: Final = 0x110000
#: Code points by which Python stands for bytes that are no UTF-8 ("surrogateescape").
_ESCAPES: Final = (0xDC80, 0xDCFF)
_BLOCK_BYTES: Final = 4 << 20
_LONGEST: Final = 4


def count_scripts(content: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Count characters and bytes by class.

    Args:
        content: any bytes, uint8 [N], UTF-8 for the most part; bytes that are not are counted as characters of one
            byte each.

    Returns:
        int64 [len(CLASSES), 2]: characters and bytes of each class. The bytes sum to N.
    """
    counts = np.zeros(len(CLASSES) * (_LONGEST + 1), np.int64)
    for block in _blocks(content):
        if not len(block):
            continue
        if int(block.max()) < 0x80:
            np.add.at(counts, _codes()[:0x80], np.bincount(block, minlength=0x80))
            continue
        text = block.tobytes().decode("utf-8", errors="surrogateescape")
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
        counts += np.bincount(_codes()[points], minlength=len(counts))
    by_length = counts.reshape(len(CLASSES), _LONGEST + 1)
    return np.stack([by_length.sum(axis=1), by_length @ np.arange(_LONGEST + 1)], axis=1)


def _blocks(content: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield pieces of some megabytes that begin and end between characters."""
    start = 0
    while start < len(content):
        end = min(len(content), start + _BLOCK_BYTES)
        # A character has at most three continuation bytes; more than that is no UTF-8, wherever it is cut.
        while end < len(content) and end > start + _BLOCK_BYTES - 3 and content[end] & 0xC0 == 0x80:
            end -= 1
        yield content[start:end]
        start = end


@cache
def _codes() -> npt.NDArray[np.uint8]:
    """Return class * 5 + length in UTF-8 for every code point."""
    points = np.arange(_CODE_POINTS)
    lengths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    lengths[_ESCAPES[0] : _ESCAPES[1] + 1] = 1
    codes = np.asarray(_classes(), dtype=np.int64) * (_LONGEST + 1) + lengths
    assert int(codes.max()) < 256
    return codes.astype(np.uint8)


def _classes() -> npt.NDArray[np.int64]:
    index = {name: number for number, name in enumerate(CLASSES)}
    of_category = {"N": index[_DIGITS], "Z": index[_SPACE], "P": index[_SIGNS], "S": index[_SIGNS]}
    category = [unicodedata.category(chr(point)) for point in range(_CODE_POINTS)]
    letters = np.array([name[0] in "LM" for name in category])
    classes = np.array([of_category.get(name[0], index[_OTHER_LETTERS]) for name in category])
    classes[[name in ("Cc", "Cf") for name in category]] = index[_CONTROL]
    classes[[name in ("Cn", "Co", "Cs") for name in category]] = index[_UNASSIGNED]
    for script, blocks in _BLOCKS.items():
        for first, last in blocks:
            part = slice(first, last + 1)
            classes[part][letters[part]] = index[script]
    for first, last in _EMOJI_RANGES:
        part = slice(first, last + 1)
        classes[part][classes[part] == index[_SIGNS]] = index[_EMOJI]
    ascii_part = classes[:0x80]
    ascii_part[ascii_part == index[_SIGNS]] = index[_ASCII_SIGNS]
    classes[[ord(character) for character in "\t\n\v\f\r\x85"]] = index[_SPACE]
    classes[_ESCAPES[0] : _ESCAPES[1] + 1] = index[_INVALID]
    return classes
