"""Loss curves as SVG, drawn from a run's `metrics.jsonl`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from blt_train.metrics import read_metrics

_TRAIN_COLOUR = "#4c72b0"
_HELD_OUT_COLOUR = "#dd8452"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Bits per byte over the training of one model."""

    title: str
    steps: tuple[int, ...]
    train_bpb: tuple[float, ...]
    """Bits per byte of each step's own batch."""
    held_out_steps: tuple[int, ...]
    held_out_bpb: tuple[float, ...]


def curve_of_run(run: Path, title: str) -> Curve:
    """Read a run directory's metrics into a curve.

    Args:
        run: the run directory that holds `metrics.jsonl`.
        title: what the curve is called.

    Returns:
        The curve.

    Raises:
        CheckpointError: a line of the file is no metrics line.
    """
    steps, evaluations = read_metrics(run)
    return Curve(
        title=title,
        steps=tuple(step.step for step in steps),
        train_bpb=tuple(step.bpb for step in steps),
        held_out_steps=tuple(evaluation.step for evaluation in evaluations),
        held_out_bpb=tuple(evaluation.holdout_bpb for evaluation in evaluations),
    )


def draw_curves(curves: Sequence[Curve]) -> str:
    """Draw curves, two panels in a row.

    Args:
        curves: one panel each; at least one.

    Returns:
        An `<svg>` element, the same for the same curves.
    """
    with rc_context({"svg.hashsalt": "blt", "font.size": 10, "font.family": "sans-serif", "svg.fonttype": "none"}):
        columns = min(len(curves), 2)
        rows = -(-len(curves) // columns)
        figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        for place, curve in enumerate(curves, start=1):
            _draw_panel(figure.add_subplot(rows, columns, place), curve)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_panel(panel: Axes, curve: Curve) -> None:
    steps = np.asarray(curve.steps)
    values = np.asarray(curve.train_bpb)
    panel.plot(steps, values, color=_TRAIN_COLOUR, alpha=0.25, linewidth=0.8)
    panel.plot(steps, _smooth(values), color=_TRAIN_COLOUR, linewidth=1.8, label="training batch (smoothed)")
    panel.plot(
        curve.held_out_steps, curve.held_out_bpb, color=_HELD_OUT_COLOUR, marker="o", markersize=4, label="held out"
    )
    panel.set_title(curve.title, loc="left", fontweight="bold")
    panel.set_xlabel("step")
    panel.set_ylabel("bits per byte")
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.25)
    panel.legend(frameon=False)


def _smooth(values: npt.NDArray[np.float64], share: float = 0.04) -> npt.NDArray[np.float64]:
    """Return the centred running mean over a share of the curve's length."""
    if values.size < 3:
        return values
    half = max(1, int(values.size * share) // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(values.size) - half, 0)
    high = np.minimum(np.arange(values.size) + half + 1, values.size)
    smoothed: npt.NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return smoothed
