"""Axes: round numbers between two ends."""

from __future__ import annotations

import math


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers from `low` to `high`, about `count` of them, at steps of 1, 2 or 5 times a power of ten.

    Args:
        low: the axis' lower end.
        high: its upper end, above `low`.
        count: about how many, at least 1.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def nice_top(value: float) -> float:
    """Return the next number from a value up that an axis may end at: 1, 1.5, 2, 3, 4, 5, 6 or 8 × a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * factor >= value * (1 - 1e-9))
