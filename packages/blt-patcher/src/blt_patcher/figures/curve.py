"""The calibration curve drawn: thresholds along, the mean patch length that each gives upwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeAlias

from blt_patcher.calibrate import Calibration, CurvePoint
from blt_patcher.figures.canvas import Dot, Drawing, Ink, Label, Path, Spot
from blt_patcher.figures.scales import nice_ticks

Scale: TypeAlias = Callable[[float], float]

_WIDTH, _HEIGHT = 760.0, 420.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 24.0, 64.0, 48.0

#: Mean patch lengths that get a line, where the curve reaches them.
_LENGTHS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)

#: Lengths far above the target would press the part that matters into a corner.
_REACH: Final = 8.0


def draw_curve(found: Calibration) -> Drawing:
    """Draw the mean patch length for each threshold, and the threshold that was found.

    Args:
        found: a calibration; its outline is drawn, or its curve where it has none.
    """
    most = max(_REACH * found.target_patch_length, 4.0)
    points = [point for point in found.outline or found.curve if point.mean_patch_length <= most]
    low, high = _ends([point.threshold for point in points])
    top = max(2.0, *(point.mean_patch_length for point in points))
    floor = min(point.mean_patch_length for point in points)

    def x(threshold: float) -> float:
        return _LEFT + (threshold - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(length: float) -> float:
        share = math.log(length / floor) / math.log(1.05 * top / floor)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    flag = found.parameter.replace("_", " ")
    drawing = Drawing(_WIDTH, _HEIGHT, f"Mean patch length by {flag}")
    drawing.add(
        Label(_LEFT, 24, f"Mean patch length by {flag}", 15, bold=True),
        Label(
            _LEFT,
            43,
            f"{found.scheme.name}: {flag} {found.threshold:g} gives {found.mean_patch_length:.4f} tokens per patch, "
            f"target {found.target_patch_length:g}",
            12,
            Ink.SOFT,
        ),
    )
    drawing.add(Label(_LEFT - 10, _TOP - 4, "tokens per patch", 11, Ink.SOFT, "start"))
    for length in _LENGTHS:
        if floor <= length <= 1.05 * top:
            drawing.add(
                Path(((_LEFT, y(length)), (_WIDTH - _RIGHT, y(length))), Ink.LINE, 0.7),
                Label(_LEFT - 10, y(length) + 4, f"{length:,}", 11, Ink.SOFT, "end"),
            )
    for tick in nice_ticks(low, high, 8):
        drawing.add(
            Path(((x(tick), _HEIGHT - _BOTTOM), (x(tick), _HEIGHT - _BOTTOM + 4)), Ink.SOFT, 0.8),
            Label(x(tick), _HEIGHT - _BOTTOM + 18, f"{tick:g}", 11, Ink.SOFT, "middle"),
        )
    drawing.add(Label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, f"{flag}, nats", 11, Ink.SOFT, "middle"))
    _draw_line(drawing, points, found, x, y)
    return drawing


def _draw_line(drawing: Drawing, points: list[CurvePoint], found: Calibration, x: Scale, y: Scale) -> None:
    """Draw the curve over the axes, its points, and the threshold that was found."""
    place = x(found.threshold), y(found.mean_patch_length)
    if len(points) > 1:
        steps = tuple((x(point.threshold), y(point.mean_patch_length)) for point in points)
        drawing.add(Path(steps, Ink.FIRST, 2.0))
    drawing.add(
        Path(((_LEFT, place[1]), place, (place[0], _HEIGHT - _BOTTOM)), Ink.BAR, 1.2, dashed=True),
        Dot(*place, 4.5, Ink.FIRE),
    )
    for point in points:
        tip = f"{point.threshold:g}: {point.mean_patch_length:.4f} tokens per patch"
        data = {"threshold": repr(point.threshold), "mean": repr(point.mean_patch_length)}
        drawing.add(Spot(x(point.threshold) - 4, y(point.mean_patch_length) - 8, 8, 16, tip, data))


def _ends(thresholds: list[float]) -> tuple[float, float]:
    """Return the ends of the axis, never one and the same."""
    low, high = min(thresholds), max(thresholds)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
