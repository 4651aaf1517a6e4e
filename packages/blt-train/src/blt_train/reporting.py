"""Where metrics go: the run's file and the caller, on the first rank."""

from __future__ import annotations

from collections.abc import Callable

from blt_train.metrics import Metrics, MetricsWriter, StepMetrics, bits_per_byte
from blt_train.runtime import Runtime, peak_memory_bytes
from blt_train.sequences import BatchFigures
from blt_train.step import StepOutcome

OnProgress = Callable[[Metrics], None]


class Reporter:
    """Passes metrics on to the file and the caller, on the first rank; does nothing on the others."""

    def __init__(self, writer: MetricsWriter | None, on_progress: OnProgress | None) -> None:
        """Name the receivers.

        Args:
            writer: of the run's metrics file; None on all ranks but the first.
            on_progress: called with the metrics of each step and evaluation.
        """
        self._writer = writer
        self._on_progress = on_progress

    def __call__(self, metrics: Metrics) -> None:
        """Report one step or evaluation."""
        if self._writer is not None:
            self._writer.write(metrics)
            if self._on_progress is not None:
                self._on_progress(metrics)

    def sync(self) -> None:
        """Make the lines so far durable."""
        if self._writer is not None:
            self._writer.sync()


def step_metrics(
    outcome: StepOutcome, figures: BatchFigures, *, step: int, seconds: float, runtime: Runtime
) -> StepMetrics:
    """Return the metrics of one optimizer step.

    Args:
        outcome: what the step gave.
        figures: of its global batch.
        step: its number, from 1.
        seconds: wall-clock time that it took.
        runtime: this process's place.
    """
    return StepMetrics(
        step=step,
        loss=outcome.nll / figures.targets,
        bpb=bits_per_byte(outcome.nll, figures.bytes),
        learning_rate=outcome.learning_rate,
        gradient_norm=outcome.gradient_norm,
        targets=figures.targets,
        bytes=figures.bytes,
        patches=figures.patches,
        mean_patch_length=figures.mean_patch_length,
        utilisation=figures.utilisation,
        epoch=figures.epoch,
        seconds=seconds,
        data_wait=outcome.waited,
        bytes_per_second=figures.bytes / seconds,
        patches_per_second=figures.patches / seconds,
        memory_bytes=peak_memory_bytes(runtime.device),
    )
