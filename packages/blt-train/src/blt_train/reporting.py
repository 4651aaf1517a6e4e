"""Where metrics go: the run's files, the observers and the caller, on the first rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from blt_train.checkpoint import SaveFigures
from blt_train.config import TrainConfig
from blt_train.config_parsing import config_to_mapping
from blt_train.hardware import peak_flops_per_second
from blt_train.inputs import Inputs
from blt_train.metrics import Metrics, MetricsWriter, StepMetrics, bits_per_byte
from blt_train.model_flops import training_flops
from blt_train.observers import BackgroundObserver, Record, open_observers
from blt_train.runtime import Runtime, peak_memory_bytes, peak_reserved_bytes
from blt_train.samples import Sample, SamplesWriter
from blt_train.sequences import BatchFigures
from blt_train.step import StepOutcome

OnProgress = Callable[[Metrics], None]


class Reporter:
    """Passes metrics and samples on, on the first rank; does nothing on the others. A context manager."""

    def __init__(
        self,
        metrics: MetricsWriter | None,
        samples: SamplesWriter | None = None,
        observers: Sequence[BackgroundObserver] = (),
        on_progress: OnProgress | None = None,
    ) -> None:
        """Name the receivers; they are closed on leaving the context.

        Args:
            metrics: of the run's metrics file; None on all ranks but the first.
            samples: of the run's samples file; None where nothing is sampled.
            observers: told of everything besides.
            on_progress: called with the metrics of each step and evaluation.
        """
        self._metrics, self._samples, self._observers = metrics, samples, observers
        self._on_progress = on_progress
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # Left in the reverse order: the files first, which take no time, then the observers.
        for observer in self._observers:
            self._stack.callback(observer.close)
        for writer in (self._metrics, self._samples):
            if writer is not None:
                self._stack.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def __call__(self, metrics: Metrics) -> None:
        """Report one step or evaluation."""
        if self._metrics is not None:
            self._metrics.write(metrics)
            self._tell(metrics)
            if self._on_progress is not None:
                self._on_progress(metrics)

    def add_samples(self, samples: Iterable[Sample]) -> None:
        """Report what the model wrote."""
        if self._samples is not None:
            for sample in samples:
                self._samples.write(sample)
                self._tell(sample)

    def sync(self) -> None:
        """Make the lines so far durable."""
        for writer in (self._metrics, self._samples):
            if writer is not None:
                writer.sync()
        for observer in self._observers:
            observer.flush()

    def _tell(self, record: Record) -> None:
        for observer in self._observers:
            observer.observe(record)


def open_reporter(config: TrainConfig, runtime: Runtime, on_progress: OnProgress | None, *, step: int) -> Reporter:
    """Return the receivers that a config asks for.

    Args:
        config: of the run.
        runtime: this process's place.
        on_progress: called on the first rank with the metrics of each step and evaluation.
        step: steps done so far.
    """
    if not runtime.is_main:
        return Reporter(None)
    run = Path(config.run)
    return Reporter(
        MetricsWriter(run),
        SamplesWriter(run) if config.logging.samples else None,
        open_observers(config.logging, run, config_to_mapping(config), first_step=step + 1),
        on_progress,
    )


def step_metrics(
    outcome: StepOutcome,
    figures: BatchFigures,
    *,
    step: int,
    nonfinite_steps: int,
    seconds: float,
    saved: SaveFigures,
    runtime: Runtime,
    inputs: Inputs,
) -> StepMetrics:
    """Return the metrics of one optimizer step.

    Args:
        outcome: what the step gave.
        figures: of its global batch.
        step: its number, from 1.
        nonfinite_steps: steps left out so far.
        seconds: wall-clock time that it took.
        saved: what checkpoints have cost since the step before.
        runtime: this process's place.
        inputs: of the run.
    """
    flops = training_flops(inputs.architecture, figures.document_tokens, figures.document_patches)
    # What one rank does in a second, were the batch shared out evenly.
    per_rank = 1 / (seconds * runtime.world_size)
    peak = _peak_flops_per_second(inputs.config, runtime)
    is_mixture = len(figures.sources) > 1
    return StepMetrics(
        step=step,
        loss=outcome.nll / figures.targets,
        bpb=bits_per_byte(outcome.nll, figures.bytes),
        learning_rate=outcome.learning_rate,
        gradient_norm=outcome.gradient_norm,
        nonfinite_steps=nonfinite_steps,
        update_norm=outcome.update_norm,
        targets=figures.targets,
        bytes=figures.bytes,
        patches=figures.patches,
        mean_patch_length=figures.mean_patch_length,
        utilisation=figures.utilisation,
        epoch=figures.epoch,
        sources={name: source.bytes / max(1, figures.bytes) for name, source in figures.sources.items()}
        if is_mixture
        else None,
        source_epochs={name: source.epoch for name, source in figures.sources.items()} if is_mixture else None,
        flops=flops,
        seconds=seconds,
        data_wait=outcome.waited,
        checkpoint_seconds=saved.seconds,
        checkpoint_bytes=saved.bytes,
        bytes_per_second=figures.bytes / seconds,
        patches_per_second=figures.patches / seconds,
        bytes_per_second_per_rank=figures.bytes * per_rank,
        patches_per_second_per_rank=figures.patches * per_rank,
        flops_per_second_per_rank=flops * per_rank,
        mfu=None if peak is None else flops * per_rank / peak,
        memory_bytes=peak_memory_bytes(runtime.device),
        memory_reserved_bytes=peak_reserved_bytes(runtime.device),
    )


def _peak_flops_per_second(config: TrainConfig, runtime: Runtime) -> float | None:
    """Return what this rank's GPU could do; None on CPU and for GPUs that are not in the table."""
    if runtime.device.type != "cuda":
        return None
    return peak_flops_per_second(
        torch.cuda.get_device_name(runtime.device), config.precision, float8=config.parallel.float8
    )
