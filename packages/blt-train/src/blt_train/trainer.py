"""The training loop: steps, evaluations and checkpoints when they are due.

What one step does is in `step`, where metrics go in `reporting`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blt_train.batches import MicroBatch
from blt_train.checkpoint import (
    Model,
    RunDirectory,
    Saver,
    Section,
    TrainerState,
    load_optimizer,
    load_section,
    optimizer_tensors,
    package_versions,
)
from blt_train.config import ScheduleConfig, TrainConfig
from blt_train.config_parsing import config_to_mapping
from blt_train.errors import TrainingError
from blt_train.evaluation import evaluate_holdouts
from blt_train.inputs import Inputs, check_launch, open_inputs
from blt_train.loader import Loader, Slice
from blt_train.metrics import EvaluationMetrics, StepMetrics, is_last_evaluation, read_metrics
from blt_train.nonfinite import NonfiniteSteps
from blt_train.optim import make_optimizer
from blt_train.parallel.building import new_model
from blt_train.parallel.float8 import check_float8
from blt_train.parallel.sharding import free_gathered
from blt_train.profiling import StepProfiler, check_profiling
from blt_train.reporting import OnProgress, Reporter, open_reporter, step_metrics
from blt_train.resume import load_for_resume, prepare_run
from blt_train.runtime import Runtime, open_runtime, telling_of_memory
from blt_train.samples import is_last_sample
from blt_train.step import StepOutcome, TrainStep
from blt_train.stopping import StopAgreed, StopPoint, StopRequest, stop_on_signals
from blt_train.training_samples import TrainingSampler

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
    """Whether all steps are done; False after SIGTERM, SIGHUP and SIGUSR1."""

    exit_status: int
    """What the process should exit with: 0, or what says which signal stopped it (`errors.EXIT_SIGTERM` and so on)."""

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
        TrainingError: the loss or gradient is no longer finite, or there is too little memory.
        InputError: data is missing or damaged.
        StoppedEarly: SIGTERM, SIGHUP or SIGUSR1 came before the first step; it is a SystemExit.
    """
    with telling_of_memory(), stop_on_signals() as stop, open_runtime(config) as runtime:
        check_launch(config, runtime.world_size)
        check_profiling(config.logging, runtime.device)
        if runtime.is_main:
            _tell_short_schedule(config.schedule)
        inputs = open_inputs(config, verify=runtime.is_main)
        run = RunDirectory(config.run)
        with contextlib.ExitStack() as stack:
            if runtime.is_main:
                stack.enter_context(run.lock())
                prepare_run(run, inputs, resume=resume)
            runtime.barrier()
            trainer = Trainer(inputs, runtime, run, stop)
            return trainer.run(on_progress)


def _tell_short_schedule(schedule: ScheduleConfig) -> None:
    """Warn of a run that ends before the learning rate has reached its peak."""
    if schedule.warmup_steps > schedule.total_steps:
        log.warning(
            "schedule.warmup_steps (%d) is more than schedule.total_steps (%d), so the learning rate never reaches its "
            "peak",
            schedule.warmup_steps,
            schedule.total_steps,
        )


class Trainer:
    """A run in progress: model, optimizer, data and the loop over them."""

    def __init__(self, inputs: Inputs, runtime: Runtime, run: RunDirectory, stop: StopRequest) -> None:
        """Build everything, on the latest checkpoint if the run has one.

        Args:
            inputs: opened and checked.
            runtime: this process's place.
            run: prepared by the first rank.
            stop: what signals ask of this process.
        """
        config = inputs.config
        self.inputs, self.runtime, self.config = inputs, runtime, config
        self._run, self._stop = run, stop
        # Refuses what cannot be done before time is spent on the model.
        if config.parallel.float8:
            sequences = config.batch.sequences_per_micro_batch
            check_float8(runtime.device, (inputs.capacity.tokens * sequences, inputs.capacity.patches * sequences))
        self._sampler = TrainingSampler(inputs, runtime)
        checkpoint = run.latest()
        if checkpoint is None:
            self.model: Model = new_model(inputs.architecture, config, runtime.device, runtime.mesh)
            self.step = 0
            self._nonfinite = NonfiniteSteps()
        else:
            self.model, state = load_for_resume(checkpoint, inputs, runtime)
            self.step = state.step
            self._nonfinite = NonfiniteSteps(total=state.nonfinite_steps, in_row=state.nonfinite_in_row)
        self.model.train()
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self._step = TrainStep(self.model, self.optimizer, config, runtime)
        if checkpoint is not None:
            load_optimizer(checkpoint, self.model, self.optimizer)
            if self._step.average is not None:
                # Filled in place: there is no room for a second copy of a large model.
                load_section(checkpoint, Section.EMA, self._step.average.tensors)
        self._stream = inputs.open_stream(run.path)
        self._saved_step = self.step if checkpoint is not None else -1
        self._looked_step = -1

    def run(self, on_progress: OnProgress | None) -> TrainResult:
        """Train up to the last step, or to the step at which a signal asks for a stop.

        Args:
            on_progress: called on the first rank with all metrics.
        """
        with contextlib.ExitStack() as stack:
            report = stack.enter_context(open_reporter(self.config, self.runtime, on_progress, step=self.step))
            saver = stack.enter_context(Saver(self._run, self.runtime, self.config.checkpoint))
            status = self._look_where_left_off(report)
            if not status and self.step < self.config.schedule.total_steps:
                status = self._loop(report, saver)
        steps, evaluations = read_metrics(self._run.path)
        checkpoint = self._run.latest()
        if checkpoint is None:
            raise TrainingError(f"{self.config.run}: the run stopped before its first checkpoint")
        return TrainResult(
            run=self._run.path,
            checkpoint=checkpoint,
            step=self.step,
            is_finished=self.step == self.config.schedule.total_steps,
            exit_status=status,
            steps=steps,
            evaluations=evaluations,
        )

    def _loop(self, report: Reporter, saver: Saver) -> int:
        """Run all remaining steps, with evaluations and checkpoints when they are due; return the exit status."""
        config, total = self.config, self.config.schedule.total_steps
        loader = Loader(
            self._stream,
            self._slice(),
            first_step=self.step,
            end_step=total,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            pin=self.runtime.device.type == "cuda",
            static_shapes=config.compile or config.parallel.float8,
        )
        status = 0
        with loader, StepProfiler(config.logging, self._run.path, self.runtime) as profiler:
            batches = iter(loader)
            started = time.perf_counter()
            while self.step < total and not status:
                profiler.begin(self.step + 1)
                metrics, status = self._train_step(batches, started, saver)
                profiler.end(self.step)
                report(metrics)
                if not status:
                    status = self._look_at_model(report)
                if status or self._is_checkpoint_due():
                    report.sync()
                    self._save(saver)
                started = time.perf_counter()
        # All done, whatever was asked for at the end.
        return status if self.step < total or self._looked_step < total else 0

    def _slice(self) -> Slice:
        """Return this rank's part of each batch."""
        return Slice(
            sequences_per_step=self.config.batch.sequences_per_step,
            sequences_per_micro_batch=self.config.batch.sequences_per_micro_batch,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )

    def _train_step(self, batches: Iterator[MicroBatch], started: float, saver: Saver) -> tuple[StepMetrics, int]:
        """Run one optimizer step; return its metrics, and the exit status that all ranks agree on, 0 to go on."""
        per_step = self.config.batch.sequences_per_step
        figures = self._stream.figures(self.step * per_step, per_step)
        outcome = self._step.run(
            batches,
            figures,
            step=self.step + 1,
            votes=lambda: (*self._stop.votes, float(saver.has_failed)),
        )
        self._stop.nothing_to_lose = False
        *asked, failures = outcome.votes
        if failures:
            saver.wait()
        self._count_nonfinite(outcome)
        self.step += 1
        seconds = time.perf_counter() - started
        metrics = step_metrics(
            outcome,
            figures,
            step=self.step,
            nonfinite_steps=self._nonfinite.total,
            seconds=seconds,
            saved=saver.take_figures(),
            runtime=self.runtime,
            inputs=self.inputs,
        )
        return metrics, StopRequest.agreed(asked)

    def _count_nonfinite(self, outcome: StepOutcome) -> None:
        """Count a step whose update was left out, and end the run after too many; every rank sees the same sums."""
        self._nonfinite = self._nonfinite.after(is_broken=outcome.broken is not None)
        if self._nonfinite.in_row < self.config.optimizer.max_nonfinite_steps:
            return
        latest = self._run.latest()
        kept = f"the last checkpoint is {latest}" if latest else "there is no checkpoint yet"
        steps = "1 step" if self._nonfinite.in_row == 1 else f"{self._nonfinite.in_row} steps in a row"
        raise TrainingError(
            f"the {outcome.broken} was not finite in {steps}, the last of them step {self.step + 1}, so training stops "
            f"({kept}): lower optimizer.learning_rate, lengthen schedule.warmup_steps, or use precision=float32"
        )

    def _is_checkpoint_due(self) -> bool:
        """Whether the present step is one after which a checkpoint is written."""
        if self.step == self.config.schedule.total_steps:
            return True
        # Weights that may be beyond help must not push sound checkpoints out.
        return self.step % self.config.checkpoint.every == 0 and not self._nonfinite.in_row

    def _is_evaluation_due(self) -> bool:
        """Whether the present step is one of those that are evaluated."""
        every = self.config.evaluation.every
        is_end = self.step in (0, self.config.schedule.total_steps)
        return is_end or (every is not None and self.step % every == 0)

    def _look_at_model(self, report: Reporter, *, is_evaluated: bool = False, is_sampled: bool = False) -> int:
        """Evaluate the model and let it write, where either is due after the present step, and report it.

        Args:
            report: takes the figures and the samples.
            is_evaluated: the first was done by an earlier launch.
            is_sampled: the second was.

        Returns:
            The exit status on which all ranks agree if they were asked to stop meanwhile; 0 to go on.
        """
        is_due = self._is_evaluation_due()
        try:
            if is_due and self.inputs.holdouts and not is_evaluated:
                self._evaluate(report)
        except StopAgreed as stopped:
            return stopped.status
        if self._sampler.is_due(self.step, was_evaluated=is_due) and not is_sampled:
            report.add_samples(self._sampler.sample(self.model, self.step))
        self._looked_step = self.step
        return 0

    def _look_where_left_off(self, report: Reporter) -> int:
        """Do what is due after the present step and was not done before, as where a signal came between."""
        done = [False, False]
        if self.runtime.is_main:
            done = [is_last_evaluation(self._run.path, self.step), is_last_sample(self._run.path, self.step)]
        is_evaluated, is_sampled = self.runtime.sum([float(is_done) for is_done in done])
        return self._look_at_model(report, is_evaluated=is_evaluated > 0, is_sampled=is_sampled > 0)

    def _evaluate(self, report: Reporter) -> None:
        """Evaluate on the held-out documents and report it."""
        started = time.perf_counter()
        result = evaluate_holdouts(
            self.model,
            self.inputs.holdouts,
            sequence_tokens=self.inputs.capacity.tokens,
            runtime=self.runtime,
            sequences_per_batch=self.config.batch.sequences_per_micro_batch,
            max_bytes=self.config.evaluation.max_bytes,
            precision=self.config.precision,
            before_batch=StopPoint(self._stop, self.runtime),
        )
        report(
            EvaluationMetrics(
                step=self.step,
                holdout_bpb=result.bpb,
                holdout_loss=result.loss,
                holdout_bytes=result.bytes,
                holdout_documents=result.documents,
                holdout_bpb_by_source=result.bpb_by_source,
                holdout_seconds=time.perf_counter() - started,
            )
        )

    def _save(self, saver: Saver) -> None:
        """Begin to write a checkpoint of the present step, unless there is one."""
        if self.step == self._saved_step:
            return
        if self.runtime.is_main:
            self._stream.save_counts(self._run.path)
        free_gathered(self.model)
        sections = {
            Section.MODEL: self.model.state_dict(),
            Section.OPTIMIZER: optimizer_tensors(self.model, self.optimizer),
        }
        if self._step.average is not None:
            sections[Section.EMA] = self._step.average.tensors
        saver.save(sections, self._state(), self.inputs.architecture)
        self._saved_step = self.step

    def _state(self) -> TrainerState:
        """Return what a checkpoint of the present step says besides tensors."""
        return TrainerState(
            step=self.step,
            config=config_to_mapping(self.config),
            data=self.inputs.data_state(),
            entropy_model=self.inputs.entropy_fingerprint,
            packages=package_versions(),
            processes=self.runtime.world_size,
            nonfinite_steps=self._nonfinite.total,
            nonfinite_in_row=self._nonfinite.in_row,
        )
