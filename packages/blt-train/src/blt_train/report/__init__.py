"""One self-contained HTML page about a run: figures, loss curves, a patch heat map, the text and the commands."""

from blt_train.report.curves import Curve, curve_of_run, draw_curves
from blt_train.report.heatmap import HeatmapPatch, heatmap_patches
from blt_train.report.page import Command, ReportContent, write_report

__all__ = [
    "Command",
    "Curve",
    "HeatmapPatch",
    "ReportContent",
    "curve_of_run",
    "draw_curves",
    "heatmap_patches",
    "write_report",
]
