"""What a report shows of one run, read from its directory as it stands: finished, running, short, resumed or broken.

Reading is lenient, unlike the trainer's: metrics of another version lack some curves, lines that are none are counted
and told. It streams, so memory stays bounded however long the run.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from blt_train.errors import CheckpointError
from blt_train.json_lines import parse_object, read_lines
from blt_train.metrics import METRICS_NAME
from blt_train.report.series import ThinnedSeries, Thinner
from blt_train.resume import CONFIG_NAME
from blt_train.samples import SAMPLES_NAME, Sample, parse_sample

#: Horizontal axes, of which each point has a place on all; all but the step are sums over the steps so far.
AXES = ("step", "bytes", "flops", "seconds")

#: Columns of a step's line that are drawn; the last is worked out from two.
COLUMNS = (
    "loss",
    "bpb",
    "learning_rate",
    "gradient_norm",
    "update_norm",
    "bytes_per_second",
    "patches_per_second",
    "flops_per_second_per_rank",
    "mfu",
    "memory_bytes",
    "memory_reserved_bytes",
    "utilisation",
    "mean_patch_length",
    "epoch",
    "nonfinite_steps",
    "data_wait_share",
)

#: Lines that are turned into arrays at once.
_CHUNK = 4096
#: Evaluations that are shown at most, and steps of which samples are.
MAX_EVALUATIONS = 1000
MAX_SAMPLE_STEPS = 40
#: Characters of a sample that are shown.
_SAMPLE_CHARACTERS = 2000
#: A run is taken to be running while its last line is younger, in seconds.
_RUNNING_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPoint:
    """One evaluation."""

    positions: tuple[float, ...]
    """Place on each of `AXES`."""

    bpb: float
    """Bits per byte of all held-out documents; nan where it was not finite."""

    by_source: Mapping[str, float]
    """Of each source; empty where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """All that is shown of one run."""

    path: Path
    """The run directory."""

    state: str
    """`finished`, `running`, `stopped` or `no step yet`."""

    notes: tuple[str, ...]
    """What a reader ought to know of the files, such as lines that could not be read."""

    config: Mapping[str, Any]
    """The config, nested; empty if it could not be read."""

    steps: int
    """Number of the last step; 0 before the first."""

    series: ThinnedSeries
    """Of `AXES` and `COLUMNS`."""

    source_bytes: Mapping[str, float]
    """Raw bytes trained on by source; empty where there is one."""

    source_epochs: Mapping[str, float]
    """Passes over each source; empty where there is one."""

    evaluations: tuple[EvaluationPoint, ...]
    """In order."""

    samples: tuple[Sample, ...]
    """In order."""


def read_run(path: Path) -> RunData:
    """Read a run directory.

    Args:
        path: the directory.

    Raises:
        CheckpointError: there is no such directory, or it holds neither metrics nor a config.
    """
    metrics, config_path = path / METRICS_NAME, path / CONFIG_NAME
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run directory")
    if not metrics.exists() and not config_path.exists():
        raise CheckpointError(f"{path}: holds neither {METRICS_NAME} nor {CONFIG_NAME}, so it is no run directory")
    notes: list[str] = []
    config = _read_config(config_path, notes)
    reader = _MetricsReader()
    reader.read(metrics, notes)
    samples = _read_samples(path / SAMPLES_NAME, notes)
    return RunData(
        path=path,
        state=_state(metrics, config, reader.steps),
        notes=tuple(notes),
        config=config,
        steps=reader.steps,
        series=reader.thinner.result(),
        source_bytes=reader.source_bytes,
        source_epochs=reader.source_epochs,
        evaluations=tuple(reader.evaluations.items()),
        samples=samples,
    )


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("is no mapping")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing.")
        return {}
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError):
        notes.append(f"{path.name} could not be read.")
        return {}
    return content


def _state(metrics: Path, config: Mapping[str, Any], steps: int) -> str:
    schedule = config.get("schedule")
    total = schedule.get("total_steps") if isinstance(schedule, dict) else None
    if total == steps:
        return "finished"
    is_young = metrics.exists() and time.time() - metrics.stat().st_mtime < _RUNNING_SECONDS
    if is_young:
        return "running"
    return "stopped" if steps else "no step yet"


@dataclass(slots=True)
class Thinned:
    """A list that halves itself whenever it grows too long; the first and the newest item always stay."""

    limit: int
    kept: list[Any] = field(default_factory=list)
    newest: Any = None
    stride: int = 1
    count: int = 0

    def add(self, item: Any) -> None:
        """Add an item."""
        if self.count % self.stride == 0:
            self.kept.append(item)
            if len(self.kept) > self.limit:
                self.kept = self.kept[::2]
                self.stride *= 2
        self.newest = item
        self.count += 1

    def items(self) -> list[Any]:
        """Return what is kept, in order."""
        has_newest = not self.kept or self.kept[-1] is self.newest
        return self.kept if has_newest else [*self.kept, self.newest]


class _MetricsReader:
    """Reads the lines of a metrics file into thinned series."""

    def __init__(self) -> None:
        self.thinner = Thinner(len(AXES), len(COLUMNS))
        self.evaluations = Thinned(limit=MAX_EVALUATIONS)
        self.source_bytes: dict[str, float] = {}
        self.source_epochs: dict[str, float] = {}
        self.steps = 0
        #: Sums of bytes, flops and seconds up to the last step.
        self._sums = np.zeros(len(AXES) - 1)
        self._rows: list[tuple[float, ...]] = []

    def read(self, path: Path, notes: list[str]) -> None:
        """Read a file; what is wrong with it is added to the notes."""
        bad: list[int] = []
        number = 0
        for number, line in read_lines(path):
            try:
                self._take(parse_object(line))
            except (ValueError, TypeError, KeyError, AttributeError):
                bad.append(number)
        self._flush()
        if number == 0:
            notes.append(f"{path.name} has no line yet." if path.exists() else f"{path.name} is missing.")
        if bad:
            first = f"the first is line {bad[0]}" if len(bad) > 1 else f"line {bad[0]}"
            notes.append(f"{len(bad)} line(s) of {path.name} could not be read ({first}).")

    def _take(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        if type(step) is not int:
            raise TypeError("step is no number")
        if "holdout_bpb" in record:
            self._flush()
            self._take_evaluation(step, record)
            return
        # A file that was put together by hand may go back; curves must not.
        if step <= self.steps:
            raise ValueError("the step comes after a later one")
        seconds = _number(record.get("seconds"))
        waits = _number(record.get("data_wait")) / seconds if seconds > 0 else math.nan
        drawn = [_number(record.get(name)) for name in COLUMNS[:-1]]
        content = _number(record["bytes"])
        if not math.isfinite(content) or not (math.isfinite(drawn[0]) or math.isfinite(drawn[1]) or "loss" in record):
            raise ValueError("is no step")
        shares = {str(name): share * content for name, share in _by_source(record, "sources").items()}
        epochs = _by_source(record, "source_epochs")
        # Now that nothing of the line can be wrong any more:
        self.steps = step
        self._rows.append((step, content, _zero(_number(record.get("flops"))), _zero(seconds), *drawn, waits))
        self.source_epochs = epochs
        for name, amount in shares.items():
            self.source_bytes[name] = self.source_bytes.get(name, 0.0) + amount
        if len(self._rows) == _CHUNK:
            self._flush()

    def _take_evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        by_source = _by_source(record, "holdout_bpb_by_source")
        bpb = _number(record["holdout_bpb"])
        self.evaluations.add(
            EvaluationPoint(positions=(float(step), *self._sums.tolist()), bpb=bpb, by_source=by_source)
        )

    def _flush(self) -> None:
        """Hand the gathered rows to the thinner."""
        if not self._rows:
            return
        rows = np.array(self._rows, dtype=np.float64)
        self._rows = []
        positions = rows[:, : len(AXES)].copy()
        positions[:, 1:] = self._sums + np.cumsum(positions[:, 1:], axis=0)
        self._sums = positions[-1, 1:].copy()
        self.thinner.add(positions, rows[:, len(AXES) :])


def _number(value: Any) -> float:
    """Return a JSON number; nan for null and for a field that is not there."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("is no number")
    return float(value)


def _by_source(record: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return a field that has a number for each source; nothing for null and for a field that is not there."""
    return {str(source): _number(value) for source, value in (record.get(name) or {}).items()}


def _zero(value: float) -> float:
    """Return a number to sum; what is missing adds nothing."""
    return value if math.isfinite(value) else 0.0


def _read_samples(path: Path, notes: list[str]) -> tuple[Sample, ...]:
    """Read the samples of some steps, spread over the run."""
    kept = Thinned(limit=MAX_SAMPLE_STEPS)
    bad = 0
    for _, group in itertools.groupby(_samples_of(path), key=lambda sample: sample and sample.step):
        together: list[Sample] = []
        for sample in group:
            if sample is None:
                bad += 1
            else:
                together.append(sample)
        if together:
            kept.add(together)
    if bad:
        notes.append(f"{bad} line(s) of {path.name} could not be read.")
    return tuple(itertools.chain.from_iterable(kept.items()))


def _samples_of(path: Path) -> Iterator[Sample | None]:
    """Yield each line's sample; None for one that cannot be read."""
    for _, line in read_lines(path):
        try:
            sample = parse_sample(line)
        except ValueError:
            yield None
            continue
        if len(sample.completion) > _SAMPLE_CHARACTERS:
            content = json.loads(line) | {"completion": sample.completion[:_SAMPLE_CHARACTERS] + "…"}
            sample = Sample(**content)
        yield sample


def names_of(paths: Iterable[Path]) -> list[str]:
    """Return a short name for each run: the last parts of its path, as many as set it apart from the others.

    Args:
        paths: the run directories.
    """
    parts = [path.resolve().parts for path in paths]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        count = next(
            (size for size in range(1, len(mine)) if all(other[-size:] != mine[-size:] for other in others)), len(mine)
        )
        names.append("/".join(mine[-count:]))
    return names
