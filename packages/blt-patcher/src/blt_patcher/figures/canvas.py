"""What every figure is made of: a few shapes on a plane, whatever file they end up in.

Coordinates are in CSS pixels, y downwards. Colours are named by what they are for, so that a page can give them other
values in the dark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal, TypeAlias


class Ink(StrEnum):
    """What a colour is for."""

    PAPER = "paper"
    INK = "ink"
    SOFT = "soft"
    LINE = "line"
    BAND_A = "band-a"
    BAND_B = "band-b"
    CURVE = "curve"
    FIRE = "fire"
    BAR = "bar"
    FIRST = "first"
    SECOND = "second"


#: Colours on a light ground: (red, green, blue) in hexadecimal.
LIGHT: Final[Mapping[Ink, str]] = {
    Ink.PAPER: "#ffffff",
    Ink.INK: "#1d2330",
    Ink.SOFT: "#667085",
    Ink.LINE: "#d9dee7",
    Ink.BAND_A: "#dde8f7",
    Ink.BAND_B: "#fbe6d6",
    Ink.CURVE: "#41506b",
    Ink.FIRE: "#c8401a",
    Ink.BAR: "#b42318",
    Ink.FIRST: "#4c72b0",
    Ink.SECOND: "#dd8452",
}

#: The same on a dark ground.
DARK: Final[Mapping[Ink, str]] = {
    Ink.PAPER: "#12161f",
    Ink.INK: "#e6e9ef",
    Ink.SOFT: "#98a2b3",
    Ink.LINE: "#333c4c",
    Ink.BAND_A: "#1e3350",
    Ink.BAND_B: "#47301f",
    Ink.CURVE: "#b3bfd4",
    Ink.FIRE: "#ff8f5e",
    Ink.BAR: "#ff7a6b",
    Ink.FIRST: "#7ea3e0",
    Ink.SECOND: "#f0a274",
}


@dataclass(frozen=True, slots=True)
class Rect:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    fill: Ink
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Path:
    """A line through two or more points."""

    points: tuple[tuple[float, float], ...]
    stroke: Ink
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A filled disc."""

    x: float
    y: float
    radius: float
    fill: Ink


@dataclass(frozen=True, slots=True)
class Label:
    """A line of text; y is its baseline."""

    x: float
    y: float
    text: str
    size: float
    fill: Ink = Ink.INK
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False
    mono: bool = False
    fallback: str | None = None
    """What to write, smaller, where no font has the text's characters; only where fonts must be chosen beforehand."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A place that can be pointed at: it says something, and carries data for programs; invisible in a PNG."""

    x: float
    y: float
    width: float
    height: float
    tip: str
    data: Mapping[str, str]


Shape: TypeAlias = Rect | Path | Dot | Label | Spot


@dataclass(slots=True)
class Drawing:
    """Shapes in the order they are painted."""

    width: float
    height: float
    title: str
    """What the figure shows, in a few words; read aloud where it cannot be seen."""
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Paint shapes over what is there."""
        self.shapes.extend(shapes)
