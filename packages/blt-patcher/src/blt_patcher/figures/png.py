"""Drawings as PNG, by matplotlib (`pip install 'blt-patcher[figures]'`).

Matplotlib writes boxes for characters that its font lacks. So for every label a font is looked for that has all of its
characters, among matplotlib's own and those installed; where there is none, the label's code point is written instead.
"""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from blt_data.errors import InputError
from blt_patcher.figures import canvas
from blt_patcher.figures.canvas import LIGHT, Drawing, Label
from blt_patcher.outputs import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Pixels of the file for each pixel of the drawing.
_DENSITY: Final = 2

_UNITS_PER_INCH: Final = 100

#: Agg, matplotlib's painter, knows no picture of more pixels a side.
_LARGEST_SIDE: Final = 65_000

_POINTS_PER_UNIT: Final = 72 / _UNITS_PER_INCH


def write_png(path: str | os.PathLike[str], drawing: Drawing) -> None:
    """Write a drawing as a PNG file, atomically; an existing file is replaced.

    Args:
        path: the file.
        drawing: what to draw.

    Raises:
        InputError: matplotlib is not installed, the drawing is too tall for a PNG, or the path is a directory.
        OSError: the file cannot be written.
    """
    if drawing.height * _DENSITY > _LARGEST_SIDE:
        raise InputError(
            f"{os.fspath(path)}: the figure would be {drawing.height * _DENSITY:,.0f} pixels tall, too tall for a PNG; "
            "show fewer bytes, or write HTML or SVG"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise InputError(f"PNG figures need {missing}; pip install 'blt-patcher[figures]'") from error
    figure = Figure(
        figsize=(drawing.width / _UNITS_PER_INCH, drawing.height / _UNITS_PER_INCH),
        facecolor=LIGHT[canvas.Ink.PAPER],
    )
    painter = FigureCanvasAgg(figure)
    _paint(figure, drawing)
    buffer = io.BytesIO()
    painter.print_figure(buffer, format="png", dpi=_UNITS_PER_INCH * _DENSITY, metadata={"Software": None})
    write_file(path, buffer.getvalue())


def _paint(figure: Figure, drawing: Drawing) -> None:
    """Paint all shapes on an axis that fills the figure and counts in the drawing's pixels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Rectangle

    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    for order, shape in enumerate(drawing.shapes):
        match shape:
            case canvas.Rect(x, y, width, height, fill, opacity):
                box = Rectangle((x, y), width, height, facecolor=LIGHT[fill], alpha=opacity, linewidth=0, zorder=order)
                axes.add_patch(box)
            case canvas.Path(points, stroke, width, dashed):
                line = Line2D(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=LIGHT[stroke],
                    linewidth=width * _POINTS_PER_UNIT,
                    linestyle=(0, (5 / width, 3 / width)) if dashed else "-",
                    zorder=order,
                )
                axes.add_line(line)
            case canvas.Dot(x, y, radius, fill):
                axes.add_patch(Circle((x, y), radius, facecolor=LIGHT[fill], linewidth=0, zorder=order))
            case Label():
                _write(axes, shape, order)
            case canvas.Spot():
                pass


def _write(axes: Any, label: Label, order: int) -> None:
    """Write a label in a font that has its characters."""
    from matplotlib.font_manager import FontProperties

    text, size = label.text, label.size
    font = font_for(text, label.mono)
    if font is None:
        size = size if label.fallback is None else 0.48 * size
        text = label.fallback or "".join(c if font_for(c, label.mono) else "\ufffd" for c in text)
        font = font_for(text, label.mono)
    properties = FontProperties(fname=font) if font is not None else FontProperties()
    if label.bold and font == font_for("a", mono=False):
        properties = FontProperties(family="DejaVu Sans", weight="bold")
    properties.set_size(size * _POINTS_PER_UNIT)
    axes.text(
        label.x,
        label.y,
        text.replace("$", r"\$"),
        fontproperties=properties,
        color=LIGHT[label.fill],
        ha={"start": "left", "middle": "center", "end": "right"}[label.anchor],
        va="baseline",
        zorder=order,
    )


@lru_cache(maxsize=8192)
def font_for(text: str, mono: bool) -> str | None:
    """Return the file of the first font that has all characters of a text, or None.

    Args:
        text: what is to be written.
        mono: prefer a font whose characters are of one width.
    """
    wanted = {ord(character) for character in text}
    for file in _fonts(mono):
        if wanted <= _characters(file):
            return file
    return None


@lru_cache(maxsize=2)
def _fonts(mono: bool) -> tuple[str, ...]:
    """Return font files in the order they are tried: matplotlib's own first, upright and regular before the rest."""
    from matplotlib import font_manager, get_data_path

    own = Path(get_data_path()) / "fonts" / "ttf"
    first = [own / name for name in (["DejaVuSansMono.ttf"] if mono else []) + ["DejaVuSans.ttf"]]

    def rank(file: str) -> tuple[bool, bool, str]:
        name = Path(file).name.lower()
        plain = not any(word in name for word in ("bold", "italic", "oblique", "light", "thin", "black", "condensed"))
        return (not plain, "sans" not in name, name)

    installed = sorted(font_manager.findSystemFonts(), key=rank)
    return (*(str(file) for file in first), *(file for file in installed if "color" not in Path(file).name.lower()))


@lru_cache(maxsize=64)
def _characters(file: str) -> frozenset[int]:
    """Return the code points that a font has; none of one that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
