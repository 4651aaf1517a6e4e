"""The page that compares runs: what it holds of whole, running, short and broken runs, and that a browser draws it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_train.records import evaluation_of, step_of, write_run

from blt_train import CheckpointError
from blt_train.cli import main
from blt_train.metrics import METRICS_NAME, Metrics, to_line
from blt_train.report.comparison import config_rows, page_data, render_comparison, write_comparison
from blt_train.report.run_data import AXES, COLUMNS, MAX_EVALUATIONS, Thinned, names_of, read_run
from blt_train.report.series import MAX_POINTS, Thinner

CONFIG = "run: {run}\noptimizer:\n  learning_rate: {rate}\nschedule:\n  total_steps: {steps}\n"


def make_run(run: Path, steps: int, *, rate: float = 0.1, total: int | None = None, mixed: bool = False) -> Path:
    """A run with an evaluation at both ends."""
    sources = {"web": 0.25, "wiki": 0.75} if mixed else None
    held_out = {"web": 2.0, "wiki": 1.0} if mixed else None
    lines: list[Metrics] = [
        evaluation_of(0, 8.0, held_out),
        *(step_of(step, sources=sources) for step in range(1, steps + 1)),
        evaluation_of(steps, 1.5, held_out),
    ]
    config = CONFIG.format(run=run, rate=rate, steps=total or steps)
    return write_run(run, lines, config, prompts=["The <moon> "])


class Page(HTMLParser):
    """The text of a page, what it would load, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.data: Any = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "data" if dict(attrs).get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data = json.loads(data)
        elif self._inside not in ("script", "style"):
            self.text += data


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 700), st.integers(1, 40), st.randoms(use_true_random=False))
def test_thinning_keeps_sums_extremes_and_ends(rows: int, limit: int, random: Any) -> None:
    values = np.array([[random.choice([random.uniform(-5, 5), np.nan]), 1.0] for _ in range(rows)]).reshape(-1, 2)
    positions = np.arange(1.0, rows + 1)[:, None]
    thinner = Thinner(1, 2, max_points=limit)
    at = 0
    while at < rows:
        size = random.randint(1, 90)
        thinner.add(positions[at : at + size], values[at : at + size])
        at += size
    series = thinner.result()
    per = series.rows_per_point
    assert len(series.means) == -(-rows // per) <= limit
    for point in range(len(series.means)):
        bucket = values[point * per : (point + 1) * per]
        assert series.positions[point, 0] == min((point + 1) * per, rows)
        present = bucket[:, 0][np.isfinite(bucket[:, 0])]
        if present.size:
            assert series.means[point, 0] == pytest.approx(present.mean())
            assert (series.lows[point, 0], series.highs[point, 0]) == (present.min(), present.max())
        else:
            assert np.isnan([series.means[point, 0], series.lows[point, 0], series.highs[point, 0]]).all()
        assert series.means[point, 1] == 1.0


def test_thinned_lists_keep_the_first_and_the_newest() -> None:
    for count in (0, 1, 5, 6, 1000):
        kept = Thinned(limit=5)
        for item in range(count):
            kept.add(item)
        items = kept.items()
        assert len(items) <= 6
        assert items == sorted(set(items))
        assert not count or (items[0], items[-1]) == (0, count - 1)


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", 6, mixed=True))
    assert (run.state, run.notes, run.steps) == ("finished", (), 6)
    assert run.series.positions[-1].tolist() == [6, 6000, 12e9, 3.0]
    assert run.series.means[:, COLUMNS.index("bpb")].tolist() == pytest.approx([7.2 / step for step in range(1, 7)])
    assert run.series.means[0, COLUMNS.index("data_wait_share")] == pytest.approx(0.1)
    assert [point.positions for point in run.evaluations] == [(0, 0, 0, 0), (6, 6000, 12e9, 3.0)]
    assert run.evaluations[1].by_source == {"web": 2.0, "wiki": 1.0}
    assert run.source_bytes == {"web": 1500, "wiki": 4500}
    assert [(sample.step, sample.completion) for sample in run.samples] == [
        (0, "text of step 0"),
        (6, "text of step 6"),
    ]


def test_runs_that_are_not_whole_are_told_so(tmp_path: Path) -> None:
    stopped = make_run(tmp_path / "stopped", 3, total=9)
    assert read_run(stopped).state == "running"
    os.utime(stopped / METRICS_NAME, (1e9, 1e9))
    assert read_run(stopped).state == "stopped"

    broken = make_run(tmp_path / "broken", 4)
    (broken / "config.yaml").write_text("a: [", encoding="utf-8")
    (broken / "samples.jsonl").write_text("x\n", encoding="utf-8")
    old = {"step": 5, "bpb": 1.0, "bytes": 10}
    after = ["nonsense", "[]", '{"step": "1"}', to_line(step_of(2)).strip(), json.dumps(old), '{"step": 6, "lo']
    with (broken / METRICS_NAME).open("a", encoding="utf-8") as file:
        file.write("\n".join(after))
    run = read_run(broken)
    assert run.steps == 5  # a line of another version has what it has
    assert run.notes == (
        "config.yaml could not be read.",
        "4 line(s) of metrics.jsonl could not be read (the first is line 7).",
        "1 line(s) of samples.jsonl could not be read.",
    )

    begun = write_run(tmp_path / "begun", [], CONFIG.format(run="x", rate=1, steps=9))
    os.utime(begun / METRICS_NAME, (1e9, 1e9))
    assert (read_run(begun).state, read_run(begun).notes) == ("no step yet", ("metrics.jsonl has no line yet.",))
    with pytest.raises(CheckpointError, match="nowhere: no such run directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="so it is no run directory"):
        read_run(tmp_path)


def test_a_long_run_takes_bounded_room(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    line = to_line(step_of(1)).replace('"step": 1,', '"step": %d,')
    held_out = to_line(evaluation_of(1, 1.0)).replace('"step": 1,', '"step": %d,')
    with (run / METRICS_NAME).open("w", encoding="utf-8") as file:
        for step in range(1, 15_001):
            file.write(line % step)
            if step % 5 == 0:
                file.write(held_out % step)
        file.write((line % 15_001).replace('"gradient_norm": 1,', '"gradient_norm": 777,'))
    size = (run / METRICS_NAME).stat().st_size
    tracemalloc.start()
    data = read_run(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.steps == 15_001
    assert MAX_POINTS / 2 < len(data.series.means) <= MAX_POINTS
    assert MAX_EVALUATIONS / 2 < len(data.evaluations) <= MAX_EVALUATIONS + 1
    # One spike among all steps is still there.
    assert data.series.highs[:, COLUMNS.index("gradient_norm")].max() == 777
    assert peak < size / 2
    assert len(render_comparison([data], ["long"])) < 1_000_000


def test_names_set_runs_apart() -> None:
    assert names_of([Path("/a/x/run"), Path("/a/y/run"), Path("/a/z")]) == ["x/run", "y/run", "z"]
    assert names_of([Path("/a/b")]) == ["b"]


def test_config_rows_put_differences_first() -> None:
    rows = config_rows([{"a": 1, "b": {"c": "x"}}, {"a": 1, "b": {"c": "y", "d": None}}, {}])
    assert [(row.key, row.values, row.differs) for row in rows] == [
        ("a", ("1", "1", "–"), True),
        ("b.c", ("x", "y", "–"), True),
        ("b.d", ("–", "null", "–"), True),
    ]
    assert [row.differs for row in config_rows([{"a": 1, "b": 2}, {"a": 1, "b": 3}])] == [True, False]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page of three runs."""
    runs = [
        make_run(tmp_path / "<script><b>", 40, mixed=True),
        make_run(tmp_path / "other", 30, rate=0.2, total=90),
        write_run(tmp_path / "begun", [], CONFIG.format(run="x", rate=1, steps=9)),
    ]
    write_comparison(tmp_path / "out" / "report.html", runs)
    return tmp_path / "out" / "report.html"


def test_the_page_stands_alone_and_escapes(page: Path, tmp_path: Path) -> None:
    shown = Page(page.read_text(encoding="utf-8"))
    assert not [tag for tag, _ in shown.tags if tag in {"link", "img", "iframe", "base"}]
    assert not [attrs for _, attrs in shown.tags if {"src", "href"} & attrs.keys()]
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)|url\((?!#|`)|@import", shown.source) == []
    assert [run["name"] for run in shown.data["runs"]] == ["<script><b>", "other", "begun"]
    assert len([tag for tag, _ in shown.tags if tag == "script"]) == 2
    assert "<b>" not in [tag for tag, attrs in shown.tags if attrs.get("class") == "run"]
    for text in ("The <moon> text of step 40", "<script><b>", "optimizer.learning_rate", "30 of 90 steps", "25.0%"):
        assert text in re.sub(r"\s+", " ", shown.text)
    assert list(page.parent.iterdir()) == [page]
    differing = re.findall(r'<tr class="differs"><th>([^<]+)', shown.source)
    assert differing == ["run", "optimizer.learning_rate", "schedule.total_steps"]


def test_the_data_of_the_page_is_that_of_the_runs(page: Path, tmp_path: Path) -> None:
    runs = [read_run(tmp_path / name) for name in ("other",)]
    (run,) = page_data(runs, ["other"])["runs"]
    assert tuple(run["positions"]) == AXES
    assert run["positions"]["seconds"][-1] == 15.0
    assert run["columns"]["loss"]["mean"][1] == 2.5
    assert "mfu" not in run["columns"]  # no run on a CPU has one
    assert run["holdout"]["bpb"] == [8.0, 1.5]


def test_command(page: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine.html"
    arguments = ["report", str(tmp_path / "other"), str(tmp_path / "other"), "--output", str(output), "--title", "Mine"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "1 run(s)" in done.stdout
    assert "<h1>Mine</h1>" in output.read_text(encoding="utf-8")
    refused = CliRunner().invoke(main, ["report", str(tmp_path / "nowhere"), "--output", str(output)])
    assert refused.exit_code == 1
    assert refused.stderr == f"error: {tmp_path / 'nowhere'}: no such run directory\n"


def test_a_browser_draws_the_curves(page: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    # Stands in for a reader who looks at FLOPs, hides a run and goes back to the first sample.
    act = """<script>
      const act = (query, type, changes, options) => {
        const element = Object.assign(document.querySelector(query), changes);
        element.dispatchEvent(new PointerEvent(type, options));
      };
      act("#axis", "change", {value: "flops"});
      act('button.run[data-run="1"]', "click");
      act(".sample input", "input", {value: 0});
      act("#charts svg", "pointermove", {}, {clientX: 400, clientY: 300});
    </script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", act), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--virtual-time-budget=2000"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    dump = [browser, *options, profile, "--dump-dom", page.as_uri()]
    shown = subprocess.run(dump, capture_output=True, text=True, timeout=120, check=True).stdout
    figures = re.findall(r'<figure class="chart[^"]*" data-title="([^"]+)">(.*?)</figure>', shown, re.DOTALL)
    titles = [title for title, _ in figures]
    assert titles[:4] == [
        "Bits per byte, training", "Bits per byte, held out", "Held out: web", "Held out: wiki"
    ]  # fmt: skip
    assert "Model FLOP utilisation" not in titles
    training = dict(figures)["Bits per byte, training"]
    assert "model FLOPs" in training
    assert re.search(r'class="mean" d="M[-0-9. ]+L', training)
    assert 'class="r0"' in training
    assert 'class="r1"' not in training  # hidden by the click
    assert "NaN" not in "".join(drawing for _, drawing in figures)
    (tip,) = re.findall(r'<div id="tip"[^>]*>(.*?)</div></div>', shown, re.DOTALL)
    assert "model FLOPs: " in tip
    visible = re.findall(r'<pre data-step="(\d+)">', shown)
    assert visible[0] == "0"


def test_evaluations_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    lines: list[Metrics] = [evaluation_of(0, 8.0, {"a": 8.0}), step_of(1), evaluation_of(1, math.nan, {"a": math.nan})]
    run = read_run(write_run(tmp_path / "run", lines, CONFIG.format(run="x", rate=1, steps=1)))
    assert run.notes == ()
    assert [math.isnan(point.bpb) for point in run.evaluations] == [False, True]
    assert page_data([run], ["run"])["runs"][0]["holdout"]["bpb"] == [8.0, None]
    text = render_comparison([run], ["run"])
    assert "not finite" in text
    assert "8.0000 at step 0" in text


def test_runs_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    good, broken, output = make_run(tmp_path / "good", 2), make_run(tmp_path / "broken", 2), tmp_path / "report.html"
    (broken / METRICS_NAME).unlink()
    (broken / METRICS_NAME).mkdir()
    given = [str(tmp_path / "nowhere"), str(broken), str(good)]
    done = CliRunner().invoke(main, ["report", *given, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert f"warning: {tmp_path / 'nowhere'}: no such run directory; the run is left out" in done.stderr
    assert f"warning: {broken / METRICS_NAME}: " in done.stderr
    assert f"{output}: 1 run(s)" in done.stdout
    output.unlink()
    none = CliRunner().invoke(main, ["report", *given[:2], "--output", str(output)])
    assert (none.exit_code, none.stderr) == (1, f"error: {tmp_path / 'nowhere'}: no such run directory\n")
    assert not output.exists()
