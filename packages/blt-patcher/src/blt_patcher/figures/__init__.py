"""Figures of patches, calibration curves and length histograms: laid out once, written as SVG, HTML or PNG."""

from blt_patcher.figures.canvas import Drawing
from blt_patcher.figures.curve import draw_curve
from blt_patcher.figures.histograms import draw_histograms
from blt_patcher.figures.page import Section, html_page, write_page, write_svg
from blt_patcher.figures.patches import draw_compared, draw_patches
from blt_patcher.figures.png import write_png

__all__ = [
    "Drawing",
    "Section",
    "draw_compared",
    "draw_curve",
    "draw_histograms",
    "draw_patches",
    "html_page",
    "write_page",
    "write_png",
    "write_svg",
]
