"""One optimizer step: accumulate over micro batches, clip, guard against what is not finite, update.

Every rank runs its micro batches, gradients are summed over micro batches and ranks, and divided by the number of
targets of the whole global batch, which all ranks know from the packing plan. The result is the gradient of the mean
loss per target whatever the number of ranks and micro batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from blt_model.loss import cross_entropy_and_z_sum
from blt_train.batches import MicroBatch
from blt_train.checkpoint import Model
from blt_train.config import TrainConfig
from blt_train.optim import WeightAverage, learning_rate
from blt_train.parallel.accumulation import begin_accumulation
from blt_train.parallel.gradients import clip, clip_whole, square_sum
from blt_train.parallel.sharding import begin_micro_batch
from blt_train.runtime import Runtime, autocast
from blt_train.sequences import BatchFigures
from blt_train.update_norm import UpdateNorm


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What one optimizer step gave; equal on all ranks but for `waited`."""

    nll: float
    """Summed loss of the global batch in nats, before the update."""

    gradient_norm: float
    """Global norm of the gradient before clipping."""

    update_norm: float | None
    """Norm of the change of all weights; 0 where there was no update, None where it is not measured."""

    learning_rate: float
    """Rate of the update."""

    waited: float
    """Seconds in which this rank waited for the loader."""

    broken: str | None
    """What is not finite, `loss` or `gradient norm`; then there was no update."""

    votes: tuple[float, ...]
    """Sums over all ranks of what each gave as its votes."""


class TrainStep:
    """Runs optimizer steps of a model."""

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, config: TrainConfig, runtime: Runtime) -> None:
        """Take the parts together.

        Args:
            model: on its device, spread over the ranks where there are several.
            optimizer: of the model's parameters.
            config: of the run.
            runtime: this process's place.
        """
        self.model, self.optimizer, self.config, self.runtime = model, optimizer, config, runtime
        decay = config.optimizer.ema_decay
        #: Moving average of the weights; a checkpoint's section "ema" is its `tensors`.
        self.average = None if decay is None else WeightAverage(model, decay)

    def run(
        self,
        batches: Iterator[MicroBatch],
        figures: BatchFigures,
        *,
        step: int,
        votes: Callable[[], Sequence[float]] = tuple,
    ) -> StepOutcome:
        """Run one optimizer step; every rank sees the same sums, so all update, or none.

        Args:
            batches: this rank's micro batches, of which the step takes its share.
            figures: of the global batch.
            step: number of the step, from 1.
            votes: gives, when the gradients are there, numbers to sum over all ranks together with the loss, equally
                many on every rank.
        """
        nll, waited = self._accumulate(batches, figures)
        total, gradient_norm, sums = self._sum_and_clip(nll, votes())
        broken = "loss" if not math.isfinite(total) else "gradient norm" if not math.isfinite(gradient_norm) else None
        rate = learning_rate(step, self.config.optimizer.learning_rate, self.config.schedule)
        measures = self.config.logging.update_norm
        update_norm = 0.0 if measures else None
        if broken is None:
            moved = UpdateNorm(self.model.parameters(), self.runtime) if measures else None
            self._update(rate, step)
            update_norm = moved.norm() if moved is not None else None
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(
            nll=total,
            gradient_norm=gradient_norm,
            update_norm=update_norm,
            learning_rate=rate,
            waited=waited,
            broken=broken,
            votes=tuple(sums),
        )

    def _sum_and_clip(self, nll: torch.Tensor, votes: Sequence[float]) -> tuple[float, float, list[float]]:
        """Return loss and votes summed over ranks, and the global norm of the gradients, which are clipped to it."""
        largest = self.config.optimizer.gradient_clip
        if self.runtime.world_size == 1:
            whole_norm = clip_whole(self.model.parameters(), largest)
            total, *sums = self.runtime.sum([nll.item(), *votes])
            return total, whole_norm, sums
        squares = square_sum(self.model.parameters(), nll.device)
        # One exchange, and one wait for the GPU, for all that ranks must agree on.
        own = torch.cat([torch.stack([nll, squares]), nll.new_tensor(list(votes))])
        total, squared_norm, *sums = self.runtime.sum(own)
        norm = math.sqrt(squared_norm)
        if math.isfinite(norm):
            clip(self.model.parameters(), norm, largest)
        return total, norm, sums

    def _update(self, rate: float, step: int) -> None:
        """Move the weights along the gradients that they have."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step)

    def _accumulate(self, batches: Iterator[MicroBatch], figures: BatchFigures) -> tuple[torch.Tensor, float]:
        """Run this rank's micro batches; return their summed loss in nats (float64) and the seconds spent waiting."""
        count = self.config.batch.micro_batches(self.runtime.world_size)
        scale = 1 / figures.targets
        nll = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        waited = 0.0
        begin_accumulation(self.model)
        for index in range(count):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            batch = batch.to(self.runtime.device)
            begin_micro_batch(self.model, self.config.parallel, is_last=index == count - 1)
            with autocast(self.runtime.device, self.config.precision):
                logits = self.model(batch.packed)
            loss, plain = cross_entropy_and_z_sum(logits, batch.targets, self.config.optimizer.z_loss)
            (loss * scale).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nll += plain.double()
        return nll, waited
