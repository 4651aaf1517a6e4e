"""Histograms of patch lengths drawn, one or two side by side."""

from __future__ import annotations

from collections.abc import Sequence

from blt_patcher.figures.canvas import Drawing, Ink, Label, Path, Rect, Spot
from blt_patcher.figures.scales import nice_ticks, nice_top
from blt_patcher.stats import PatchStats, paired_bars

_WIDTH, _HEIGHT = 1120.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 58.0, 46.0
_INKS = (Ink.FIRST, Ink.SECOND)


def draw_histograms(stats: Sequence[PatchStats], names: Sequence[str]) -> Drawing:
    """Draw the share of patches of each length.

    Args:
        stats: one or two sets of patch lengths.
        names: what each is called.
    """
    bars = paired_bars(stats)
    top = nice_top(max((share for _, _, shares in bars for share in shares), default=1.0) or 1.0)
    drawing = Drawing(_WIDTH, _HEIGHT, "Patch lengths")
    drawing.add(Label(_LEFT, 24, "Patch lengths", 15, bold=True))
    x = _LEFT
    for name, figures, ink in zip(names, stats, _INKS, strict=False):
        text = f"{name} · mean {figures.mean:.4g}"
        drawing.add(Rect(x, 35, 10, 10, ink), Label(x + 16, 44, text, 12, Ink.SOFT))
        x += 34 + 6.6 * len(text)

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share / top * (_HEIGHT - _TOP - _BOTTOM)

    for tick in nice_ticks(0, 100 * top, 4):
        drawing.add(
            Path(((_LEFT, y(tick / 100)), (_WIDTH - _RIGHT, y(tick / 100))), Ink.LINE, 0.7),
            Label(_LEFT - 8, y(tick / 100) + 4, f"{tick:g}%", 11, Ink.SOFT, "end"),
        )
    room = (_WIDTH - _LEFT - _RIGHT) / max(len(bars), 1)
    width = min(0.78 * room / len(stats), 30.0)
    for number, (low, high, shares) in enumerate(bars):
        middle = _LEFT + (number + 0.5) * room
        name = f"{low}" if low == high else f"{low}–{high}"
        drawing.add(Label(middle, _HEIGHT - _BOTTOM + 16, name, 10 if len(name) < 6 else 8, Ink.SOFT, "middle"))
        for place, (share, ink) in enumerate(zip(shares, _INKS, strict=False)):
            left = middle + (place - len(shares) / 2) * width
            drawing.add(Rect(left, y(share), width - 1, _HEIGHT - _BOTTOM - y(share), ink))
            drawing.add(Spot(left, _TOP, width, _HEIGHT - _BOTTOM - _TOP, f"{name}: {100 * share:.2f}%", {}))
    drawing.add(Label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "tokens in a patch", 11, Ink.SOFT, "middle"))
    return drawing
