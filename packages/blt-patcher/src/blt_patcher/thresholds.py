"""Thresholds as constants that bit patterns of entropies are compared with, for float16 and for float32."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from blt_patcher.vectors import FLOAT16_OVERFLOW

#: All bits of a bit pattern but the sign, by the pattern's width in bits.
_MAGNITUDE: Final = {16: 0x7FFF, 32: 0x7FFFFFFF}


@lru_cache(maxsize=1)
def finite_float16() -> npt.NDArray[np.float16]:
    """Return every finite float16 in rising order, zero once: float16 [63487], read-only."""
    magnitudes = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    values = np.concatenate([-magnitudes[:0:-1], magnitudes])
    values.flags.writeable = False
    return values


@lru_cache(maxsize=256)
def comparison(threshold: float, width: int) -> tuple[int, int]:
    """Return the constants that decide by integers alone whether an entropy, rounded to float16, exceeds a threshold.

    Positive floats sort like their bit patterns, and like no negative ones when read as signed integers; flipping all
    but the sign turns the order of negative ones round.

    Args:
        threshold: θ in nats, any finite number.
        width: bits of an entropy, 16 (float16) or 32 (float32).

    Returns:
        `flip` and `key`: a finite H exceeds θ exactly if pattern(H) ^ flip > key, as signed integers of that width.
    """
    flip = 0 if threshold >= 0 else _MAGNITUDE[width]
    index = int(np.searchsorted(finite_float16().astype(np.float64), threshold, side="right")) - 1
    # Below all numbers: more negative than any pattern of a finite one.
    pattern = 2**width - 1 if index < 0 else _greatest_below(index, width)
    key = pattern ^ flip
    return flip, key - 2**width if key >= 2 ** (width - 1) else key


def _greatest_below(index: int, width: int) -> int:
    """Return the pattern of the greatest float16 or float32 that, rounded, is at most `finite_float16()[index]`."""
    values = finite_float16()
    value = values[index]
    if width == 16:
        return int(value.view(np.uint16))
    if index + 1 == values.size:
        return int(np.float32(FLOAT16_OVERFLOW).view(np.uint32))
    # Halfway to the next one, which is where rounding decides; a tie goes to the even pattern.
    middle = np.float32((float(value) + float(values[index + 1])) / 2)
    if int(value.view(np.uint16)) & 1:
        middle = np.nextafter(middle, np.float32(-np.inf))
    return int(middle.view(np.uint32))
