"""What training measures, and `metrics.jsonl`, where it is kept: one JSON object per line.

A line with `bpb` tells of one optimizer step, a line with `holdout_bpb` of one evaluation. The lines of a resumed run
are those of an uninterrupted one but for times and speeds: lines beyond the checkpoint are cut off on resuming.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import IO, Any

from blt_train.errors import CheckpointError
from blt_train.files import naming, replace_text

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step, summed over all ranks."""

    step: int
    """Number of the step, from 1."""

    loss: float
    """Nats per target (bytes and EOS) of the step's global batch, before its update."""

    bpb: float
    """Bits per byte of the same batch: summed loss / (ln 2 x raw bytes)."""

    learning_rate: float
    """Rate of this step's update."""

    gradient_norm: float
    """Global norm of the gradient before clipping."""

    targets: int
    """Predictions in the global batch."""

    bytes: int
    """Raw bytes in the global batch."""

    patches: int
    """Patches in the global batch; 0 for the byte LM."""

    mean_patch_length: float | None
    """Input tokens per patch; null for the byte LM."""

    utilisation: float
    """Share of the batch's token positions that are no padding."""

    epoch: float
    """Passes over the training data completed."""

    seconds: float
    """Wall-clock time since the previous step's end, evaluation and checkpoints left out."""

    data_wait: float
    """Seconds of that in which the first rank waited for the loader."""

    bytes_per_second: float
    """Raw bytes per second, all ranks together."""

    patches_per_second: float
    """Patches per second, all ranks together."""

    memory_bytes: int
    """Peak memory of the first rank: allocated on its GPU, or resident in RAM on CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationMetrics:
    """One evaluation on the held-out documents during training."""

    step: int
    """Optimizer steps done before it."""

    holdout_bpb: float
    """Bits per byte: summed loss of every byte and EOS / (ln 2 x raw bytes)."""

    holdout_loss: float
    """Nats per target."""

    holdout_bytes: int
    """Raw bytes evaluated."""

    holdout_documents: int
    """Documents evaluated."""

    holdout_seconds: float
    """Wall-clock time it took."""


Metrics = StepMetrics | EvaluationMetrics


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """Return bits per byte.

    Args:
        nll: summed negative log-likelihood in nats, of bytes and EOS.
        num_bytes: raw bytes, at least 1 for a finite result.
    """
    return nll / (math.log(2) * num_bytes) if num_bytes else math.inf


def to_line(metrics: Metrics) -> str:
    """Return the metrics as one JSON line."""
    return json.dumps(dataclasses.asdict(metrics), allow_nan=False) + "\n"


def from_record(record: dict[str, Any]) -> Metrics:
    """Return the metrics of one decoded JSON line.

    Raises:
        TypeError: it holds other fields, or a value that is no number.
    """
    metrics = EvaluationMetrics(**record) if "holdout_bpb" in record else StepMetrics(**record)
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, NoneType)):
            raise TypeError(f"{name} is no number")
    return metrics


def read_metrics(run: str | os.PathLike[str]) -> tuple[tuple[StepMetrics, ...], tuple[EvaluationMetrics, ...]]:
    """Read a run's metrics.

    Args:
        run: the run directory.

    Returns:
        The steps and the evaluations, in order; a last line that a killed process left half-written is passed over.

    Raises:
        CheckpointError: a line is no metrics line; it is named.
    """
    steps: list[StepMetrics] = []
    evaluations: list[EvaluationMetrics] = []
    for metrics in _read(Path(run) / METRICS_NAME):
        if isinstance(metrics, StepMetrics):
            steps.append(metrics)
        else:
            evaluations.append(metrics)
    return tuple(steps), tuple(evaluations)


def _read(path: Path) -> list[Metrics]:
    """Return all whole lines of a metrics file; a missing file has none."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not whole
    result: list[Metrics] = []
    for number, line in enumerate(lines, start=1):
        try:
            result.append(from_record(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: line {number} is no metrics line; delete the line to go on") from error
    return result


def truncate_metrics(run: Path, step: int) -> None:
    """Cut off the lines that tell of steps after `step`, atomically.

    Args:
        run: the run directory.
        step: last step to keep; below 0 keeps nothing.
    """
    kept = [metrics for metrics in _read(run / METRICS_NAME) if metrics.step <= step]
    replace_text(run / METRICS_NAME, "".join(map(to_line, kept)))


class MetricsWriter:
    """Appends lines to a run's metrics file; a context manager."""

    def __init__(self, run: Path) -> None:
        """Open the file for appending.

        Args:
            run: the run directory.
        """
        self._path = run / METRICS_NAME
        self._file: IO[str] = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failed write closing fails again; the first error is the one to tell.
        with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
            self._file.close()

    def write(self, metrics: Metrics) -> None:
        """Append one line; readers see it at once."""
        with naming(self._path):
            self._file.write(to_line(metrics))
            self._file.flush()

    def sync(self) -> None:
        """Make all lines so far durable, as a checkpoint that vouches for them needs."""
        os.fsync(self._file.fileno())
