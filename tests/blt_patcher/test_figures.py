"""Figures read back: the bytes, patches and entropies that a page, an SVG or a PNG shows are those of the document."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_patcher import plain
from tests.blt_patcher.test_viewing import texts, view_of

from blt_data.errors import InputError
from blt_patcher import EntropyMonotonicScheme, EntropyScheme, PatchScheme, SpaceScheme, StaticScheme
from blt_patcher.calibrate import calibrate
from blt_patcher.figures import (
    Drawing,
    Section,
    draw_compared,
    draw_curve,
    draw_histograms,
    draw_patches,
    html_page,
    write_page,
    write_png,
    write_svg,
)
from blt_patcher.figures.canvas import DARK, LIGHT, Ink, Label, Rect, Spot
from blt_patcher.figures.canvas import Path as Line
from blt_patcher.figures.png import font_for
from blt_patcher.figures.scales import nice_ticks, nice_top
from blt_patcher.figures.svg import to_svg
from blt_patcher.stats import PatchStats

SVG = "{http://www.w3.org/2000/svg}"


class Columns(HTMLParser):
    """The data that a page's columns carry, and the page's text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.columns: list[dict[str, str]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if values.get("class") == "spot" and "data-token" in values:
            self.columns.append({key.removeprefix("data-"): value for key, value in values.items()})

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@settings(max_examples=40)
@given(data=texts, scheme=plain.schemes, width=st.sampled_from([200.0, 1120.0]))
def test_a_page_parsed_back_holds_the_bytes_patches_and_entropies(
    data: bytes, scheme: PatchScheme, width: float
) -> None:
    view = view_of(data, scheme)
    drawing = draw_patches(view, width=width)
    page = html_page("A <title> & more", "lead", view.figures(), [Section(drawings=[drawing])])
    columns = Columns(page).columns
    assert [int(column["token"]) for column in columns] == list(range(len(data) + 2))
    assert bytes(int(column["byte"], 16) for column in columns[1:-1]) == data
    assert "byte" not in columns[0]
    assert "byte" not in columns[-1]
    patches = np.repeat(np.arange(view.patch_lengths.size), view.patch_lengths)
    assert [int(column["patch"]) for column in columns] == patches.tolist()
    assert view.entropies is not None
    shown = [float(column["entropy"]) for column in columns[1:]]
    np.testing.assert_allclose(shown, view.entropies[:-1].astype(np.float64), rtol=1e-5, atol=1e-30)
    # Columns lie side by side, within the drawing, and none upon another.
    boxes = [(float(c["y"]), float(c["x"]), float(c["x"]) + float(c["width"])) for c in columns]
    for left, right in itertools.pairwise(boxes):
        assert right[0] > left[0] or right[1] == pytest.approx(left[2], abs=0.02)
    assert all(right <= drawing.width + 0.01 for _, _, right in boxes)


@settings(max_examples=40)
@given(data=texts, title=st.text(max_size=20), scheme=plain.schemes)
def test_an_svg_is_sound_xml_with_every_patch_as_a_band(data: bytes, title: str, scheme: PatchScheme) -> None:
    view = view_of(data, scheme)
    drawing = draw_patches(view)
    drawing.add(Label(0, 0, title, 10))
    root = ET.fromstring(to_svg(drawing))
    rects = [element.get("class") for element in root.iter(f"{SVG}rect")]
    assert rects.count("f-band-a") + rects.count("f-band-b") >= view.patch_lengths.size
    starts = [shape for shape in drawing.shapes if isinstance(shape, Line) and shape.stroke is Ink.SOFT]
    assert sum(len(line.points) == 2 and line.points[0][0] == line.points[1][0] for line in starts) == (
        view.patch_lengths.size
    )


def test_dots_are_drawn_where_the_entropy_is_and_fire_above_the_bar() -> None:
    data = "Größe 中文".encode()
    for scheme in (EntropyScheme(threshold=1.0), EntropyMonotonicScheme(relative_threshold=0.3)):
        view = view_of(data, scheme)
        drawing = draw_patches(view)
        fires = [
            shape for shape in drawing.shapes if getattr(shape, "fill", None) is Ink.FIRE and hasattr(shape, "radius")
        ]
        expected = [token for token in view.tokens() if token.bar is not None and (token.entropy or 0) > token.bar]
        # One more stands in the legend.
        assert len(fires) == len(expected) + 1
        spots = {shape.data["token"]: shape for shape in drawing.shapes if isinstance(shape, Spot)}
        for dot, token in zip(sorted(fires[1:], key=lambda dot: dot.x), expected, strict=True):  # type: ignore[union-attr]
            spot = spots[str(token.token)]
            assert dot.x == pytest.approx(spot.x + spot.width / 2)  # type: ignore[union-attr]
            assert "starts a patch" in spot.tip
            assert f"> {token.bar:.4g} nats" in spot.tip


def test_text_that_would_be_markup_stays_text(tmp_path: Path) -> None:
    data = b'<script>alert("1")</script>&amp;'
    view = view_of(data, SpaceScheme())
    write_page(
        tmp_path / "page.html", html_page("<b>", "a & b", {"<i>": "</dd>"}, [Section(drawings=[draw_patches(view)])])
    )
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<i>" not in page
    assert page.count("<b>") == 0
    assert bytes(int(column["byte"], 16) for column in Columns(page).columns[1:-1]) == data
    # Nothing is loaded from anywhere.
    assert not re.search(r"""(?:src|href)=|url\(|@import""", page)


@pytest.mark.parametrize("wide", [0, 1])
def test_a_png_has_the_drawings_size_and_ink(tmp_path: Path, wide: int) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    data = [b"plain $text$ \\frac", "ज़ 中文 ع 👩🏽‍🚀 \U0001fbfa".encode() + b"\xff\x00"][wide]
    drawing = draw_patches(view_of(data, EntropyScheme(threshold=1.0)), width=700)
    write_png(tmp_path / "a.png", drawing)
    raw = (tmp_path / "a.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", raw[16:24]) == (round(drawing.width) * 2, round(drawing.height) * 2)
    image = (matplotlib_image.imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int)
    for ink in (Ink.BAND_A, Ink.BAND_B, Ink.PAPER):
        colour = [int(LIGHT[ink][place : place + 2], 16) for place in (1, 3, 5)]
        assert (image == colour).all(axis=2).mean() > 0.01, ink
    write_png(tmp_path / "b.png", drawing)
    assert (tmp_path / "b.png").read_bytes() == raw


def test_characters_that_no_font_has_are_written_as_code_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert font_for("a", mono=False)
    assert font_for("\U0010fffd", mono=False) is None
    missing = Label(10, 30, "\U0010fffd", 15, fallback="U+10FFFD")
    for name, label in (("missing", missing), ("written", Label(10, 30, "U+10FFFD", 0.48 * 15))):
        write_png(tmp_path / f"{name}.png", Drawing(100, 40, "x", [label]))
    assert (tmp_path / "missing.png").read_bytes() == (tmp_path / "written.png").read_bytes()


def test_a_png_that_would_be_too_tall_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.png: the figure would be 80,000 pixels tall, too tall for a PNG"):
        write_png(tmp_path / "a.png", Drawing(100, 40_000, "x"))


def test_without_matplotlib_one_sentence_tells_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from blt_patcher.figures import Drawing, write_png, write_svg\n"
        "write_svg('a.svg', Drawing(10, 10, 'x'))\n"
        "try: write_png('a.png', Drawing(10, 10, 'x'))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "PNG figures need matplotlib; pip install 'blt-patcher[figures]'\n", done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.svg"]


def test_compared_patchings_lie_column_under_column_and_differences_stand_out() -> None:
    data = "one two 中文 three".encode()
    above, below = view_of(data, SpaceScheme()), view_of(data, StaticScheme(patch_length=4))
    drawing = draw_compared(above, below, width=300)
    starts = [{token.token for token in view.tokens() if token.starts} for view in (above, below)]
    marks = [shape for shape in drawing.shapes if isinstance(shape, Line) and len(shape.points) == 2]
    upright = [mark for mark in marks if mark.points[0][0] == mark.points[1][0]]
    assert sum(mark.stroke is Ink.FIRE for mark in upright) == len(starts[0] ^ starts[1])
    assert sum(mark.stroke is Ink.SOFT for mark in upright) == 2 * len(starts[0] & starts[1])
    bands = [shape for shape in drawing.shapes if isinstance(shape, Rect) and shape.fill in (Ink.BAND_A, Ink.BAND_B)]
    assert len(bands) >= above.patch_lengths.size + below.patch_lengths.size


def test_the_curve_goes_through_every_point_found(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    nats = rng.exponential(1.4, 4002).astype(np.float16)
    offsets = np.array([0, 4000])
    for scheme, parameter in (
        (EntropyScheme(threshold=0.0), "threshold"),
        (EntropyMonotonicScheme(relative_threshold=0.0, max_patch_length=9), "relative_threshold"),
    ):
        found = calibrate(scheme, parameter, 2.5, np.zeros(4000, np.uint8), offsets, nats, outline_points=30)
        assert 20 < len(found.outline) <= 31
        drawing = draw_curve(found)
        spots = [shape for shape in drawing.shapes if isinstance(shape, Spot)]
        told = [(float(spot.data["threshold"]), float(spot.data["mean"])) for spot in spots]
        known = {(point.threshold, point.mean_patch_length) for point in found.outline}
        assert set(told) <= known
        assert (found.threshold, found.mean_patch_length) in told
        # Further right is further up, and all of it lies within the axes.
        heights = [spot.y for spot in sorted(spots, key=lambda spot: spot.x)]
        assert heights == sorted(heights, reverse=True)
        assert all(40 < spot.y < drawing.height - 40 for spot in spots)
        write_svg(tmp_path / "curve.svg", drawing)
        ET.parse(tmp_path / "curve.svg")


def test_a_curve_of_one_point_can_be_drawn() -> None:
    nats = np.zeros(5, np.float16)
    found = calibrate(EntropyScheme(threshold=0.0), "threshold", 2.5, np.zeros(3, np.uint8), np.array([0, 3]), nats)
    ET.fromstring(to_svg(draw_curve(found)))


def test_histogram_bars_are_as_tall_as_the_shares() -> None:
    counts = np.zeros((2, 65_536), np.int64)
    counts[0, [1, 2, 40]] = [50, 25, 25]
    counts[1, [2, 700]] = [10, 30]
    stats = [PatchStats(documents=1, bytes=1000, counts=row) for row in counts]
    drawing = draw_histograms(stats, ["a", "b"])
    heights = {
        ink: [shape.height for shape in drawing.shapes if isinstance(shape, Rect) and shape.fill is ink][1:]
        for ink in (Ink.FIRST, Ink.SECOND)
    }
    tallest = max(heights[Ink.SECOND])
    assert [round(h / tallest * 0.75, 6) for h in heights[Ink.FIRST] if h] == [0.5, 0.25, 0.25]
    assert [round(h / tallest * 0.75, 6) for h in heights[Ink.SECOND] if h] == [0.25, 0.75]
    nothing = PatchStats(documents=0, bytes=0, counts=np.zeros(65_536, np.int64))
    ET.fromstring(to_svg(draw_histograms([nothing, nothing], ["a", "b"])))


@given(low=st.floats(-10, 10), span=st.floats(1e-3, 1e5), count=st.integers(1, 10))
def test_ticks_are_round_and_within_the_axis(low: float, span: float, count: int) -> None:
    ticks = nice_ticks(low, low + span, count)
    assert len(ticks) <= 2.6 * count + 1
    assert all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in ticks)
    assert nice_top(span) >= span * (1 - 1e-9)
    assert nice_top(span) <= 2.5 * span


def test_every_ink_has_a_colour_in_the_light_and_in_the_dark() -> None:
    assert set(LIGHT) == set(DARK) == set(Ink)
