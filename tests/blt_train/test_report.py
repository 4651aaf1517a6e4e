"""The report page: what it shows, that it stands alone, and that text cannot break out of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_train.records import evaluation_of, step_of

from blt_train.metrics import Metrics, to_line
from blt_train.report import Command, Curve, ReportContent, curve_of_run, draw_curves, heatmap_patches, write_report

CURVE = Curve(
    title="BLT", steps=(1, 2, 3, 4), train_bpb=(8.0, 6.0, 5.0, 4.5), held_out_steps=(0, 4), held_out_bpb=(8.1, 4.6)
)


class TextOfPage(HTMLParser):
    """Collects the text, and the tags that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "link", "img", "iframe"}:
            self.outside.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def content_of(text: bytes, lengths: list[int], prompt: str = "p", continuation: str = "c") -> ReportContent:
    entropies = np.linspace(0, 5, len(text) + 2).astype(np.float16)
    return ReportContent(
        title="A run",
        figures={"held-out BPB": "2.10"},
        curves=[CURVE, CURVE],
        heatmap=heatmap_patches(
            np.frombuffer(text, np.uint8), np.array(lengths, np.uint16), entropies, limit_bytes=10_000
        ),
        heatmap_caption="A document.",
        prompt=prompt,
        continuation=continuation,
        commands=[Command(title="Prepare", line="blt-data prepare --output a b", seconds=1.4)],
    )


def test_page_stands_alone_and_escapes(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, content_of(b"<script>x</script>&", [1, 8, 12], prompt="<b>", continuation="</pre><script>"))
    page = path.read_text(encoding="utf-8")
    parser = TextOfPage()
    parser.feed(page)
    text = "".join(parser.text)
    assert parser.outside == []
    assert "<script>x</script>&" in text
    assert "</pre><script>" in text
    assert "held-out BPB" in text
    assert "blt-data prepare --output a b" in text
    assert re.findall(r'(?:src|href)="(?!#)', page) == []
    assert not list(tmp_path.glob(".*"))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.data())
def test_heatmap_shows_every_byte_once(text: bytes, data: st.DataObject) -> None:
    lengths, left = [1], len(text) + 1
    while left:
        lengths.append(data.draw(st.integers(1, left)))
        left -= lengths[-1]
    entropies = np.arange(len(text) + 2).astype(np.float16)
    patches = heatmap_patches(
        np.frombuffer(text, np.uint8), np.array(lengths, np.uint16), entropies, limit_bytes=len(text) + 1
    )
    shown = bytearray()
    marks = {"↵\n": "\n", "⇥\t": "\t", "␍": "\r"}
    for patch in patches:
        for cell in patch.cells:
            # H[j - 1] stands before byte j - 1 of the text: here simply the byte's position.
            assert cell.entropy == len(shown)
            is_mark = cell.text in marks and text[len(shown) : len(shown) + 1] in (b"\n", b"\t", b"\r")
            shown += bytes.fromhex(cell.text) if cell.is_hex else (marks[cell.text] if is_mark else cell.text).encode()
    assert bytes(shown) == text


def test_character_cut_by_a_boundary_is_shown_in_hex() -> None:
    text = "é".encode()
    cut = heatmap_patches(
        np.frombuffer(text, np.uint8), np.array([1, 1, 2], np.uint16), np.zeros(4, np.float16), limit_bytes=9
    )
    whole = heatmap_patches(
        np.frombuffer(text, np.uint8), np.array([1, 3], np.uint16), np.zeros(4, np.float16), limit_bytes=9
    )
    assert [[cell.text for cell in patch.cells] for patch in cut] == [["c3"], ["a9"]]
    assert [[cell.text for cell in patch.cells] for patch in whole] == [["é"]]


def test_curve_of_run_and_drawing(tmp_path: Path) -> None:
    metrics: list[Metrics] = [
        evaluation_of(0, 8.0), step_of(1, bpb=7.5), step_of(2, bpb=7.0), evaluation_of(2, 7.1)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(to_line(line) for line in metrics))
    curve = curve_of_run(tmp_path, "LM")
    assert (curve.steps, curve.train_bpb) == ((1, 2), (7.5, 7.0))
    assert (curve.held_out_steps, curve.held_out_bpb) == ((0, 2), (8.0, 7.1))
    drawing = draw_curves([curve])
    assert drawing.startswith("<svg")
    assert "bits per byte" in drawing
    assert drawing == draw_curves([curve])
