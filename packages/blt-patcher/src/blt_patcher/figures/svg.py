"""Drawings as SVG: self-contained, and light or dark with the page around them."""

from __future__ import annotations

import re
from html import escape
from typing import Final

from blt_patcher.figures.canvas import DARK, LIGHT, Dot, Drawing, Ink, Label, Path, Rect, Shape, Spot

#: What no XML file can hold, not even escaped; a viewer would refuse the whole file.
_NOT_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_SANS: Final = "system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','DejaVu Sans',sans-serif"
_MONO: Final = "ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"


def colour_rules() -> str:
    """Return the style sheet that gives every colour its value, in the light and in the dark."""

    def rules(palette: dict[Ink, str]) -> str:
        return "".join(f".f-{ink}{{fill:{value}}}.s-{ink}{{stroke:{value}}}" for ink, value in palette.items())

    return (
        f".blt text{{font-family:{_SANS}}}.blt text.m{{font-family:{_MONO}}}.blt path{{fill:none}}"
        ".blt .spot{fill:transparent}.blt .spot:hover{fill:#808080;fill-opacity:.28}"
        f"{rules(dict(LIGHT))}@media (prefers-color-scheme:dark){{{rules(dict(DARK))}}}"
    )


def to_svg(drawing: Drawing, *, standalone: bool = True) -> str:
    """Return a drawing as an `<svg>` element.

    Args:
        drawing: what to draw.
        standalone: bring along the style sheet and the paper, which a page has already.

    Returns:
        The element, the same for the same drawing.
    """
    width, height = _number(drawing.width), _number(drawing.height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="blt" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><title>{_text(drawing.title)}</title>'
    ]
    if standalone:
        parts.append(f"<style>{colour_rules()}</style>")
        parts.append(_shape(Rect(0, 0, drawing.width, drawing.height, Ink.PAPER)))
    parts += [_shape(shape) for shape in drawing.shapes]
    parts.append("</svg>")
    return "\n".join(parts)


def _shape(shape: Shape) -> str:
    match shape:
        case Rect():
            opacity = f' fill-opacity="{_number(shape.opacity)}"' if shape.opacity < 1 else ""
            return f'<rect class="f-{shape.fill}" {_box(shape)}{opacity}/>'
        case Path():
            steps = "L".join(f"{_number(x)} {_number(y)}" for x, y in shape.points)
            dashes = ' stroke-dasharray="5 3"' if shape.dashed else ""
            return f'<path class="s-{shape.stroke}" d="M{steps}" stroke-width="{_number(shape.width)}"{dashes}/>'
        case Dot():
            return (
                f'<circle class="f-{shape.fill}" cx="{_number(shape.x)}" cy="{_number(shape.y)}" '
                f'r="{_number(shape.radius)}"/>'
            )
        case Label():
            return _label(shape)
        case Spot():
            data = "".join(f' data-{name}="{_text(value)}"' for name, value in shape.data.items())
            return f'<rect class="spot" {_box(shape)}{data}><title>{_text(shape.tip)}</title></rect>'


def _label(label: Label) -> str:
    anchor = "" if label.anchor == "start" else f' text-anchor="{label.anchor}"'
    weight = ' font-weight="600"' if label.bold else ""
    return (
        f'<text class="f-{label.fill}{" m" if label.mono else ""}" x="{_number(label.x)}" y="{_number(label.y)}" '
        f'font-size="{_number(label.size)}"{anchor}{weight}>{_text(label.text)}</text>'
    )


def _box(shape: Rect | Spot) -> str:
    x, y, width, height = (_number(value) for value in (shape.x, shape.y, shape.width, shape.height))
    return f'x="{x}" y="{y}" width="{width}" height="{height}"'


def _text(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text), quote=True)


def _number(value: float) -> str:
    """Return a coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
