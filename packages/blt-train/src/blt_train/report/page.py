"""The report page: one HTML file with nothing outside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from blt_train.files import replace_text
from blt_train.report.curves import Curve, draw_curves
from blt_train.report.heatmap import LARGEST_ENTROPY, HeatmapPatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One stage of a run and the command line that reproduces it."""

    title: str
    line: str
    seconds: float | None
    """Seconds that the stage took, None where it was found done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportContent:
    """All that the page shows."""

    title: str
    figures: Mapping[str, str]
    """Name to formatted value, in the order shown."""
    curves: Sequence[Curve]
    heatmap: Sequence[HeatmapPatch]
    heatmap_caption: str
    prompt: str
    continuation: str
    commands: Sequence[Command]


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page, atomically.

    Args:
        path: the HTML file.
        content: what it shows.

    Raises:
        OSError: the file cannot be written.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("blt_train.report").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        content=content,
        curves_svg=Markup(draw_curves(content.curves)),
        largest_entropy=LARGEST_ENTROPY,
    )
    replace_text(path, page)
