"""Metrics to write, read and draw, without a run that made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blt_train.metrics import METRICS_NAME, EvaluationMetrics, Metrics, StepMetrics, to_line
from blt_train.samples import SamplesWriter, sample_of


def step_of(step: int, **changes: Any) -> StepMetrics:
    """A step's metrics with plausible numbers."""
    numbers: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(StepMetrics)), 1)
    numbers |= {
        "step": step,
        "loss": 5.0 / step,
        "bpb": 7.2 / step,
        "bytes": 1000,
        "flops": 2e9,
        "seconds": 0.5,
        "data_wait": 0.05,
        "epoch": step / 100,
        "nonfinite_steps": 0,
        "sources": None,
        "source_epochs": None,
        "mfu": None,
        "memory_reserved_bytes": None,
    }
    return StepMetrics(**{**numbers, **changes})


def evaluation_of(step: int, bpb: float, by_source: Mapping[str, float] | None = None) -> EvaluationMetrics:
    """An evaluation's metrics."""
    return EvaluationMetrics(
        step=step,
        holdout_bpb=bpb,
        holdout_loss=bpb * 0.69,
        holdout_bytes=100,
        holdout_documents=3,
        holdout_bpb_by_source=by_source,
        holdout_seconds=0.1,
    )


def write_run(run: Path, metrics: Iterable[Metrics], config: str = "", prompts: Iterable[str] = ()) -> Path:
    """Write a run directory of metrics, a config and samples at the steps of the evaluations."""
    run.mkdir(parents=True, exist_ok=True)
    lines = list(metrics)
    (run / METRICS_NAME).write_text("".join(map(to_line, lines)), encoding="utf-8")
    if config:
        (run / "config.yaml").write_text(config, encoding="utf-8")
    with SamplesWriter(run) as writer:
        for line in lines:
            if isinstance(line, EvaluationMetrics):
                for index, prompt in enumerate(prompts):
                    writer.write(sample_of(line.step, index, prompt, f"text of step {line.step}".encode(), "length"))
    return run
