"""The training loop: steps, evaluations and checkpoints when they are due.

What one step does is in `step`, where metrics go in `reporting`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from blt_train.batches import MicroBatch
from blt_train.checkpoint import Model, RunDirectory, TrainerState, load_optimizer, package_versions
from blt_train.config import TrainConfig
from blt_train.config_parsing import config_to_mapping
from blt_train.errors import TrainingError
from blt_train.evaluation import Evaluation, evaluate_model
from blt_train.inputs import Inputs, check_launch, open_inputs
from blt_train.loader import Loader, Slice
from blt_train.metrics import (
    EvaluationMetrics,
    MetricsWriter,
    StepMetrics,
    read_metrics,
)
from blt_train.optim import make_optimizer
from blt_train.parallel.building import new_model
from blt_train.reporting import OnProgress, Reporter, step_metrics
from blt_train.resume import load_for_resume, prepare_run
from blt_train.runtime import Runtime, open_runtime
from blt_train.step import StepOutcome, TrainStep

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """A run as it stands when `train` returns."""

    run: Path
    """The run directory."""

    checkpoint: Path
    """The latest checkpoint: a model directory."""

    step: int
    """Optimizer steps done."""

    is_finished: bool
    """Whether all steps are done; False after SIGTERM."""

    steps: tuple[StepMetrics, ...]
    """Metrics of every step of the run, also of earlier launches."""

    evaluations: tuple[EvaluationMetrics, ...]
    """Metrics of every evaluation of the run; the first is of step 0."""

    @property
    def bytes_per_second(self) -> float:
        """Raw bytes per second over all steps; 0 before the first."""
        seconds = sum(metrics.seconds for metrics in self.steps)
        return sum(metrics.bytes for metrics in self.steps) / seconds if seconds else 0.0


def train(config: TrainConfig, *, resume: bool = True, on_progress: OnProgress | None = None) -> TrainResult:
    """Train a model, from the run directory's latest checkpoint if there is one.

    Under torchrun every process calls this and each trains its share of every batch.

    Args:
        config: of the run.
        resume: go on from an earlier launch; False refuses a run directory that already has a checkpoint.
        on_progress: called on the first rank with the metrics of each step and evaluation.

    Returns:
        The run's state. A run that was already complete returns at once.

    Raises:
        ConfigError: the config is at odds with itself, the data, the device or the number of processes.
        CheckpointError: the run's checkpoint is of another model, other data or another config, or is damaged.
        TrainingError: the loss or gradient is no longer finite.
        InputError: data is missing or damaged.
    """
    with open_runtime(config) as runtime:
        check_launch(config, runtime.world_size)
        inputs = open_inputs(config, verify=runtime.is_main)
        run = RunDirectory(config.run)
        with contextlib.ExitStack() as stack:
            if runtime.is_main:
                stack.enter_context(run.lock())
                prepare_run(run, inputs, resume=resume)
            runtime.barrier()
            trainer = Trainer(inputs, runtime, run)
            return trainer.run(on_progress)


class Trainer:
    """A run in progress: model, optimizer, data and the loop over them."""

    def __init__(self, inputs: Inputs, runtime: Runtime, run: RunDirectory) -> None:
        """Build everything, on the latest checkpoint if the run has one.

        Args:
            inputs: opened and checked.
            runtime: this process's place.
            run: prepared by the first rank.
        """
        config = inputs.config
        self.inputs, self.runtime, self.config = inputs, runtime, config
        self._run = run
        checkpoint = run.latest()
        if checkpoint is None:
            self.model: Model = new_model(inputs.architecture, config, runtime.device, runtime.mesh)
            self.step = 0
        else:
            self.model, self.step = load_for_resume(checkpoint, inputs, runtime)
        self.model.train()
        self.optimizer = make_optimizer(self.model, config.optimizer)
        if checkpoint is not None:
            load_optimizer(checkpoint, self.model, self.optimizer)
        self._step = TrainStep(self.model, self.optimizer, config, runtime)
        self._stream = inputs.open_stream(run.path)
        self._saved_step = self.step if checkpoint is not None else -1

    def run(self, on_progress: OnProgress | None) -> TrainResult:
        """Train up to the last step, or to the step at which SIGTERM arrives.

        Args:
            on_progress: called on the first rank with all metrics.
        """
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(stop_on_sigterm())
            writer = stack.enter_context(MetricsWriter(self._run.path)) if self.runtime.is_main else None
            if self.step < self.config.schedule.total_steps:
                self._loop(stop, Reporter(writer, on_progress=on_progress))
        steps, evaluations = read_metrics(self._run.path)
        checkpoint = self._run.latest()
        if checkpoint is None:
            raise TrainingError(f"{self.config.run}: the run stopped before its first checkpoint")
        return TrainResult(
            run=self._run.path,
            checkpoint=checkpoint,
            step=self.step,
            is_finished=self.step == self.config.schedule.total_steps,
            steps=steps,
            evaluations=evaluations,
        )

    def _loop(self, stop: threading.Event, report: Reporter) -> None:
        """Run all remaining steps, with evaluations and checkpoints when they are due."""
        config, total = self.config, self.config.schedule.total_steps
        if self.step == 0:
            self._evaluate(report)
        loader = Loader(
            self._stream,
            self._slice(),
            first_step=self.step,
            end_step=total,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            pin=self.runtime.device.type == "cuda",
            static_shapes=config.compile,
        )
        with loader:
            batches = iter(loader)
            started = time.perf_counter()
            while self.step < total:
                metrics, stopping = self._train_step(batches, started, stop)
                report(metrics)
                every = config.evaluation.every
                if self.step == total or (every is not None and self.step % every == 0):
                    self._evaluate(report)
                if stopping or self.step == total or self.step % config.checkpoint.every == 0:
                    report.sync()
                    self._save()
                if stopping:
                    return
                started = time.perf_counter()

    def _slice(self) -> Slice:
        """Return this rank's part of each batch."""
        return Slice(
            sequences_per_step=self.config.batch.sequences_per_step,
            sequences_per_micro_batch=self.config.batch.sequences_per_micro_batch,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )

    def _train_step(
        self, batches: Iterator[MicroBatch], started: float, stop: threading.Event
    ) -> tuple[StepMetrics, bool]:
        """Run one optimizer step; return its metrics and whether any rank was asked to stop."""
        per_step = self.config.batch.sequences_per_step
        figures = self._stream.figures(self.step * per_step, per_step)
        outcome = self._step.run(batches, figures, step=self.step + 1, votes=[float(stop.is_set())])
        self._check_finite(outcome)
        self.step += 1
        seconds = time.perf_counter() - started
        metrics = step_metrics(
            outcome, figures, step=self.step, seconds=seconds, runtime=self.runtime, inputs=self.inputs
        )
        return metrics, outcome.votes[0] > 0

    def _check_finite(self, outcome: StepOutcome) -> None:
        """End a run whose update would have been broken; every rank sees the same sums, so all end."""
        if outcome.broken is None:
            return
        latest = self._run.latest()
        kept = f"the last checkpoint is {latest}" if latest else "there is no checkpoint yet"
        raise TrainingError(
            f"the {outcome.broken} is not finite at step {self.step + 1}, so training stops before that update; "
            f"{kept}: lower optimizer.learning_rate, lengthen schedule.warmup_steps, or use precision=float32"
        )

    def _evaluate(self, report: Reporter) -> None:
        """Evaluate on the held-out documents, if the run has any, and report it."""
        # One is evaluated for now; the first is that of a single directory.
        holdout = next(iter(self.inputs.holdouts.values()), None)
        if holdout is None:
            return
        started = time.perf_counter()
        result: Evaluation = evaluate_model(
            self.model,
            holdout,
            sequence_tokens=self.inputs.capacity.tokens,
            runtime=self.runtime,
            sequences_per_batch=self.config.batch.sequences_per_micro_batch,
            max_bytes=self.config.evaluation.max_bytes,
            precision=self.config.precision,
        )
        report(
            EvaluationMetrics(
                step=self.step,
                holdout_bpb=result.bpb,
                holdout_loss=result.loss,
                holdout_bytes=result.bytes,
                holdout_documents=result.documents,
                holdout_bpb_by_source=None,
                holdout_seconds=time.perf_counter() - started,
            )
        )

    def _save(self) -> None:
        """Write a checkpoint of the present step, on the first rank; all ranks go on when it is durable."""
        if self.step == self._saved_step:
            return
        manifest = self.inputs.directory.manifest
        state = TrainerState(
            step=self.step,
            config=config_to_mapping(self.config),
            data={
                "fingerprint": manifest.fingerprint(),
                "kind": str(manifest.kind),
                "provenance": dict(manifest.provenance),
            },
            entropy_model=self.inputs.entropy_fingerprint,
            packages=package_versions(),
        )
        if self.runtime.is_main:
            self._stream.save_counts(self._run.path)
        keep_last = self.config.checkpoint.keep_last
        directory = self._run.save(self.model, self.optimizer, state, keep_last, is_main=self.runtime.is_main)
        if self.runtime.is_main:
            log.info("checkpoint %s", directory)
        self.runtime.barrier()
        self._saved_step = self.step


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """While the block runs, let SIGTERM set an event rather than end the process.

    Yields:
        The event. Outside the main thread, where Python allows no handlers, nothing sets it.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        event.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
