"""Text cut into patches and coloured by how unsure the entropy LM was before each byte.

A byte's colour is the entropy of the prediction that it was drawn from, H[j-1] for framed token j: that is the number
that the patch scheme compares with its threshold, so a dark byte is one that could start a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Entropy of a uniform guess among the 256 bytes and EOS, in nats: the scale's upper end.
LARGEST_ENTROPY = float(np.log(257))

_VISIBLE = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍", " ": " "}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapCell:
    """What is shown as one unit: a character, or one byte of a character that a boundary cuts."""

    text: str
    """The character, or the byte in hexadecimal."""
    entropy: float
    """Nats before the unit's first byte."""
    is_hex: bool
    """Whether `text` is a byte in hexadecimal."""

    @property
    def strength(self) -> float:
        """Colour strength from 0 (certain) to 1 (as good as a uniform guess)."""
        return min(max(self.entropy / LARGEST_ENTROPY, 0.0), 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapPatch:
    """One patch and its units."""

    cells: tuple[HeatmapCell, ...]
    length: int
    """Framed tokens in the patch."""


def heatmap_patches(
    content: npt.NDArray[np.uint8],
    patch_lengths: npt.NDArray[np.uint16],
    entropies: npt.NDArray[np.float16],
    *,
    limit_bytes: int,
) -> list[HeatmapPatch]:
    """Return the patches of a document's beginning, ready to be drawn.

    Args:
        content: uint8 [N] raw bytes.
        patch_lengths: uint16 [P] patch lengths of the framed document (sum N + 2, the first patch BOS alone).
        entropies: float16 [N + 2] nats after each framed token.
        limit_bytes: patches that start after this many bytes are left out.

    Returns:
        The patches that hold bytes; EOS is not shown.
    """
    patches = []
    start = 0
    for length in patch_lengths[1:].tolist():
        end = min(start + length, content.size)
        if end > start:
            cells = _cells(content[start:end].tobytes(), entropies[start:end].astype(np.float64))
            patches.append(HeatmapPatch(cells=cells, length=length))
        start = end
        if start >= limit_bytes:
            break
    return patches


def _cells(data: bytes, entropies: npt.NDArray[np.float64]) -> tuple[HeatmapCell, ...]:
    """Split a patch's bytes into whole characters where there are any, and bytes in hexadecimal elsewhere."""
    cells = []
    position = 0
    while position < len(data):
        text, width = _character(data, position)
        cells.append(HeatmapCell(text=text, entropy=float(entropies[position]), is_hex=width == 0))
        position += max(width, 1)
    return tuple(cells)


def _character(data: bytes, position: int) -> tuple[str, int]:
    """Return the printable character at a position and its bytes; 0 bytes mean a single byte in hexadecimal."""
    for width in range(1, 5):
        try:
            character = data[position : position + width].decode("utf-8")
        except UnicodeDecodeError:
            continue
        if character in _VISIBLE:
            return _VISIBLE[character], width
        if character and character.isprintable():
            return character, width
        break
    return f"{data[position]:02x}", 0
