"""What training measures, and `metrics.jsonl`, where it is kept: one JSON object per line.

A line with `bpb` tells of one optimizer step, a line with `holdout_bpb` of one evaluation. The lines of a resumed run
are those of an uninterrupted one but for times and speeds: lines beyond the checkpoint are cut off on resuming.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from blt_train.json_lines import JsonLinesWriter, cut_after_step, naming_line, parse_object, read_last_lines, read_lines

METRICS_NAME = "metrics.jsonl"

#: Fields that hold a number for each source.
_BY_SOURCE = frozenset({"sources", "source_epochs", "holdout_bpb_by_source"})

#: Fields that are NaN where a step or the weights were not finite, for which JSON has no number: there they are null.
_MAY_BE_BROKEN = frozenset({"loss", "bpb", "gradient_norm", "holdout_bpb", "holdout_loss"})

#: What is told of a line that nothing like metrics is in; it goes on from "line 3 ".
_NO_LINE = "is no metrics line; delete the line to go on"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step, summed over all ranks."""

    step: int
    """Number of the step, from 1."""

    loss: float
    """Nats per target (bytes and EOS) of the step's global batch, before its update; null where it is not finite."""

    bpb: float
    """Bits per byte of the same batch: summed loss / (ln 2 x raw bytes); null where it is not finite."""

    learning_rate: float
    """Rate of this step's update."""

    gradient_norm: float
    """Global norm of the gradient before clipping; null where it is not finite."""

    nonfinite_steps: int
    """Steps so far that were left out because loss or gradient was not finite."""

    update_norm: float | None
    """Norm of the change of all weights by this step; null where `logging.update_norm` is false."""

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

    sources: Mapping[str, float] | None
    """Share of the batch's bytes from each source of a mixture; null for one directory."""

    source_epochs: Mapping[str, float] | None = None
    """Passes over each source of a mixture completed; null for one directory."""

    flops: float
    """Model operations of the step, forward and backward, all ranks together; no recomputation, no padding."""

    seconds: float
    """Wall-clock time since the previous step's end, evaluation and checkpoints left out."""

    data_wait: float
    """Seconds of that in which the first rank waited for the loader."""

    checkpoint_seconds: float
    """Seconds for which training stood still for checkpoints since the step before; not part of `seconds`."""

    checkpoint_bytes: int
    """Size of the checkpoints that became complete since the step before, all ranks together."""

    bytes_per_second: float
    """Raw bytes per second, all ranks together."""

    patches_per_second: float
    """Patches per second, all ranks together."""

    bytes_per_second_per_rank: float
    """The same for one rank, that is one GPU."""

    patches_per_second_per_rank: float
    """The same for one rank, that is one GPU."""

    flops_per_second_per_rank: float
    """Model operations per second of one rank, that is one GPU."""

    mfu: float | None
    """Model FLOP utilisation: that over the GPU's peak; null on CPU and for GPUs whose peak is not known."""

    memory_bytes: int
    """Peak memory of the first rank so far: allocated on its GPU, or resident in RAM on CPU."""

    memory_reserved_bytes: int | None
    """Peak memory that the allocator of the first rank's GPU has taken so far; null on CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationMetrics:
    """One evaluation on the held-out documents during training."""

    step: int
    """Optimizer steps done before it."""

    holdout_bpb: float
    """Bits per byte: summed loss of every byte and EOS / (ln 2 x raw bytes); null where it is not finite."""

    holdout_loss: float
    """Nats per target; null where it is not finite."""

    holdout_bytes: int
    """Raw bytes evaluated."""

    holdout_documents: int
    """Documents evaluated."""

    holdout_bpb_by_source: Mapping[str, float] | None
    """The bits per byte of each source that has a byte: the sources of a mixture, or those that the documents of one
    directory name; null where there is only one."""

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
    record = dataclasses.asdict(metrics)
    for name, value in record.items():
        if isinstance(value, dict):
            record[name] = {source: _or_null(number) for source, number in value.items()}
        elif isinstance(value, float):
            record[name] = _or_null(value)
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def from_record(record: dict[str, Any]) -> Metrics:
    """Return the metrics of one decoded JSON line.

    Raises:
        TypeError: it holds other fields, or a value that is no number; the message goes on from "line 3 ".
    """
    kind = EvaluationMetrics if "holdout_bpb" in record else StepMetrics
    names = {item.name for item in dataclasses.fields(kind)}
    if names != record.keys():
        if len(names & record.keys()) < 2:
            raise TypeError(_NO_LINE)
        missing, unknown = sorted(names - record.keys()), sorted(record.keys() - names)
        told = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which is unknown"
        raise TypeError(
            f"{told}: another version of blt-train wrote it; go on with that version, or move the file away, and the "
            "metrics begin anew"
        )
    for name, value in record.items():
        values = value.values() if isinstance(value, dict) and name in _BY_SOURCE else (value,)
        if not all(isinstance(item, (int, float, NoneType)) and not isinstance(item, bool) for item in values):
            raise TypeError(_NO_LINE)
    broken: dict[str, Any] = {name: math.nan for name in _MAY_BE_BROKEN if name in record and record[name] is None}
    for name in _BY_SOURCE & record.keys():
        if isinstance(record[name], dict):
            broken[name] = {key: math.nan if number is None else number for key, number in record[name].items()}
    return kind(**{**record, **broken})


def parse_line(line: bytes) -> Metrics:
    """Return the metrics of one line of the file.

    Raises:
        ValueError: it is no JSON object.
        TypeError: as `from_record`.
    """
    try:
        record = parse_object(line)
    except ValueError as error:
        raise ValueError(_NO_LINE) from error
    return from_record(record)


def stream_metrics(run: str | os.PathLike[str]) -> Iterator[Metrics]:
    """Read a run's metrics one by one.

    Args:
        run: the run directory.

    Yields:
        Steps and evaluations in order; a last line that a killed process left half-written is passed over.

    Raises:
        CheckpointError: a line is no metrics line; it is named.
    """
    path = Path(run) / METRICS_NAME
    for number, line in read_lines(path):
        with naming_line(path, number):
            metrics = parse_line(line)
        yield metrics


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
    for metrics in stream_metrics(run):
        if isinstance(metrics, StepMetrics):
            steps.append(metrics)
        else:
            evaluations.append(metrics)
    return tuple(steps), tuple(evaluations)


def is_last_evaluation(run: Path, step: int) -> bool:
    """Return whether a run's metrics end with the evaluation after a step.

    Args:
        run: the run directory.
        step: optimizer steps done.
    """
    last = read_last_lines(run / METRICS_NAME)[-1:]
    return any(isinstance(found := parse_line(line), EvaluationMetrics) and found.step == step for line in last)


def truncate_metrics(run: Path, step: int) -> None:
    """Cut off the lines that tell of steps after `step`, atomically.

    Args:
        run: the run directory.
        step: last step to keep; below 0 keeps nothing.

    Raises:
        CheckpointError: a line to keep is no metrics line; it is named.
    """
    cut_after_step(run / METRICS_NAME, step, lambda line: parse_line(line).step)


class MetricsWriter(JsonLinesWriter):
    """Appends lines to a run's metrics file; a context manager."""

    def __init__(self, run: Path) -> None:
        """Open the file for appending.

        Args:
            run: the run directory.
        """
        super().__init__(run / METRICS_NAME)

    def write(self, metrics: Metrics) -> None:
        """Append one line; readers see it at once."""
        self.write_line(to_line(metrics))
