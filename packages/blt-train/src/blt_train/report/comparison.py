"""The page that compares runs: curves, configs, final figures and samples in one HTML file with nothing outside itself.

The curves are drawn in the browser by the page's own script, from thinned numbers that lie in the page, so that the
horizontal axis, the smoothing and the runs shown can be changed there. Tables and samples need no script.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from blt_data.console import sentence_of
from blt_data.units import format_bytes, format_duration
from blt_train.files import replace_text
from blt_train.report.run_data import AXES, COLUMNS, RunData, names_of, read_run

#: Significant digits of the numbers in the page.
_DIGITS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigRow:
    """One config key and its value in each run."""

    key: str
    values: tuple[str, ...]
    differs: bool
    """Whether the runs do not all have the same value."""


def write_comparison(
    path: Path, runs: Sequence[Path], *, title: str | None = None, warn: Callable[[str], None] = lambda _: None
) -> list[RunData]:
    """Read runs and write the page, atomically.

    Args:
        path: the HTML file.
        runs: run directories, at least one; one that is named twice is shown once.
        title: of the page; None for one from the runs' names.
        warn: is told of each run that is left out since it cannot be read, in one sentence.

    Returns:
        What was read, in the order shown.

    Raises:
        CheckpointError: no run is left, and the first directory is missing or no run directory.
        OSError: no run is left, and a file of the first cannot be read; or the page cannot be written.
    """
    distinct = list({run.resolve(): run for run in runs}.values())
    data: list[RunData] = []
    broken: list[OSError | ValueError] = []
    for run in distinct:
        try:
            data.append(read_run(run))
        except (OSError, ValueError) as error:
            broken.append(error)
    if not data:
        raise broken[0]
    for reason in broken:
        warn(f"{sentence_of(reason)}; the run is left out")
    page = render_comparison(data, names_of([run.path for run in data]), title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)
    return data


def render_comparison(runs: Sequence[RunData], names: Sequence[str], *, title: str | None = None) -> str:
    """Return the page's HTML.

    Args:
        runs: at least one.
        names: of the runs.
        title: of the page; None for one from the names.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_template("comparison.html.j2")).render(
        title=title or ("Run " + names[0] if len(runs) == 1 else f"{len(runs)} runs"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        runs=[
            {
                "name": name,
                "path": str(run.path),
                "state": run.state,
                "notes": run.notes,
                "progress": _progress(run),
            }
            for name, run in zip(names, runs, strict=True)
        ],
        figures=_figure_rows(runs),
        config=config_rows([run.config for run in runs]),
        prompts=_prompts(runs),
        data=Markup(_json_for_script(page_data(runs, names))),
        style=Markup(_template("comparison.css")),
        script=Markup(_template("comparison.js")),
    )


def page_data(runs: Sequence[RunData], names: Sequence[str]) -> dict[str, Any]:
    """Return what the page's script draws, as plain JSON values; null for a number that is missing.

    Args:
        runs: what was read.
        names: of the runs.
    """
    return {"axes": AXES, "runs": [_run_data(run, name) for run, name in zip(runs, names, strict=True)]}


def _run_data(run: RunData, name: str) -> dict[str, Any]:
    series = run.series
    columns = {}
    for index, column in enumerate(COLUMNS):
        if np.isfinite(series.means[:, index]).any():
            columns[column] = {"mean": _plain(series.means[:, index])}
            if series.rows_per_point > 1:
                columns[column] |= {"low": _plain(series.lows[:, index]), "high": _plain(series.highs[:, index])}
    places = np.array([point.positions for point in run.evaluations]).reshape(-1, len(AXES))
    sources = sorted({source for point in run.evaluations for source in point.by_source})
    return {
        "name": name,
        "positions": {axis: _plain(series.positions[:, index], 9) for index, axis in enumerate(AXES)},
        "columns": columns,
        "stepsPerPoint": series.rows_per_point,
        "holdout": {
            "positions": {axis: _plain(places[:, index], 9) for index, axis in enumerate(AXES)},
            "bpb": _plain(np.array([point.bpb for point in run.evaluations])),
            "bySource": {
                source: _plain(np.array([point.by_source.get(source, math.nan) for point in run.evaluations]))
                for source in sources
            },
        },
    }


def _plain(values: npt.NDArray[np.float64], digits: int = _DIGITS) -> list[float | None]:
    """Return numbers rounded to some significant digits; None for what is not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


def _json_for_script(content: Any) -> str:
    """Return JSON that no text in it can end the script element with."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _template(name: str) -> str:
    return files("blt_train.report").joinpath("templates", name).read_text(encoding="utf-8")


def _progress(run: RunData) -> str:
    schedule = run.config.get("schedule")
    total = schedule.get("total_steps") if isinstance(schedule, dict) else None
    return f"{run.steps:,} of {total:,} steps" if isinstance(total, int) else f"{run.steps:,} steps"


def config_rows(configs: Sequence[Mapping[str, Any]]) -> list[ConfigRow]:
    """Return the keys of some configs, those that differ first.

    Args:
        configs: nested; a key that one lacks is shown as a dash.
    """
    flat = [_flat(config) for config in configs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    rows = []
    for key in keys:
        values = tuple(config.get(key, "–") for config in flat)
        rows.append(ConfigRow(key=key, values=values, differs=len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row.differs)


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _figure_rows(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return name and value per run of the final figures; rows that no run has are left out."""
    figures = [_figures(run) for run in runs]
    names = list(dict.fromkeys(name for mine in figures for name in mine))
    return [(name, [mine.get(name, "–") for mine in figures]) for name in names]


def _figures(run: RunData) -> dict[str, str]:
    figures: dict[str, str] = {}
    if run.evaluations:
        figures["held out, bits per byte"] = _finite(run.evaluations[-1].bpb)
        finite = [point for point in run.evaluations if math.isfinite(point.bpb)]
        if finite:
            best = min(finite, key=lambda point: point.bpb)
            figures["best held out"] = f"{best.bpb:.4f} at step {best.positions[0]:,.0f}"
        for source, bpb in sorted(run.evaluations[-1].by_source.items()):
            figures[f"held out, {source}"] = _finite(bpb)
    if not run.steps:
        return figures
    _, content, flops, seconds = run.series.positions[-1].tolist()
    last = {name: run.series.means[-1, index] for index, name in enumerate(COLUMNS)}
    mean = {name: _mean(run.series.means[:, index]) for index, name in enumerate(COLUMNS)}
    high = {name: _largest(run.series.highs[:, index]) for index, name in enumerate(COLUMNS)}
    tail = max(1, len(run.series.means) // 50)
    figures["training, bits per byte (last 2%)"] = _finite(_mean(run.series.means[-tail:, COLUMNS.index("bpb")]))
    figures["steps"] = f"{run.steps:,}"
    figures["epochs"] = f"{run.series.highs[-1, COLUMNS.index('epoch')]:.2f}"
    figures["bytes read"] = format_bytes(content)
    for source, amount in sorted(run.source_bytes.items()):
        epochs = f", {run.source_epochs[source]:.2f} epochs" if source in run.source_epochs else ""
        figures[f"bytes read, {source}"] = f"{format_bytes(amount)} ({100 * amount / content:.1f}%{epochs})"
    if flops:
        figures["model FLOPs"] = f"{flops:.3g}"
    figures["training time"] = format_duration(seconds)
    figures["bytes/s, all ranks"] = f"{format_bytes(content / seconds)}/s" if seconds else "–"
    shown = {
        "MFU, mean": f"{100 * mean['mfu']:.1f}%",
        "data wait": f"{100 * mean['data_wait_share']:.1f}%",
        "utilisation": f"{100 * mean['utilisation']:.1f}%",
        "mean patch length": f"{mean['mean_patch_length']:.2f} tokens",
        "peak memory": format_bytes(high["memory_bytes"]),
        "peak memory reserved": format_bytes(high["memory_reserved_bytes"]),
        "steps skipped as not finite": f"{last['nonfinite_steps']:.0f}",
    }
    figures |= {name: value for name, value in shown.items() if "nan" not in value}
    return figures


def _finite(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _mean(values: npt.NDArray[np.float64]) -> float:
    present = values[np.isfinite(values)]
    return float(present.mean()) if present.size else math.nan


def _largest(values: npt.NDArray[np.float64]) -> float:
    present = values[np.isfinite(values)]
    return float(present.max()) if present.size else math.nan


def _prompts(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return, for each prompt of any run, the completions of each run, oldest first."""
    prompts = dict.fromkeys(sample.prompt for run in runs for sample in run.samples)
    return [
        {
            "prompt": prompt,
            "runs": [
                [{"step": sample.step, "text": sample.completion} for sample in run.samples if sample.prompt == prompt]
                for run in runs
            ],
        }
        for prompt in prompts
    ]
