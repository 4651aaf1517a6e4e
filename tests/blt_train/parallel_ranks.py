"""A few training steps of a tiny model, spread over ranks in every way there is, as a program.

    parallel_ranks.py OUTPUT

For 1, 2 and 4 ranks and each way that fits, OUTPUT/NAME-RANKS.json has losses and norms of the steps, a digest of the
initial weights and how many numbers each rank holds; NAME-RANKS.safetensors the gradients of the first step, summed
over ranks. All ways train the same model on the same global batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.blt_train.ranks import free_port, run_ranks
from torch import Tensor

from blt_model import pack_documents, preset
from blt_model.loss import cross_entropy_sum
from blt_model.packed import PackedBatch
from blt_train.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from blt_train.optim import make_optimizer
from blt_train.parallel.building import empty_model
from blt_train.parallel.compilation import compile_blocks
from blt_train.parallel.gradients import clip, square_sum
from blt_train.parallel.rows import local_rows, whole
from blt_train.parallel.seeding import fill_weights
from blt_train.parallel.sharding import begin_micro_batch
from blt_train.runtime import Runtime, open_runtime

DOCUMENTS = 8
STEPS = 3
#: Rows of the tables that neither 2 nor 4 ranks share evenly.
ODD_TABLE = 61


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to spread the training."""

    ranks: tuple[int, ...]
    """Numbers of ranks for which it is run."""
    parallel: dict[str, Any] = field(default_factory=dict)
    """Fields of `ParallelConfig`."""
    per_micro_batch: int = 2
    """Documents in a micro batch of one rank."""
    preset: str = "blt-debug"
    hashes: dict[str, Any] = field(default_factory=lambda: {"table_size": ODD_TABLE})
    """Fields of the hash embedding."""
    is_compiled: bool = False


WAYS = {
    "plain": Way(ranks=(1, 2, 4)),
    "bytes": Way(ranks=(1, 2), preset="entropy-debug", hashes={}),
    "accumulating": Way(ranks=(2, 4), per_micro_batch=1),
    "reducing": Way(ranks=(2,), per_micro_batch=1, parallel={"reduce_each_micro_batch": True}),
    "keeping": Way(ranks=(2,), per_micro_batch=1, parallel={"reshard_after_forward": False}),
    "copies": Way(ranks=(4,), per_micro_batch=1, parallel={"shard_ranks": 2}),
    "copies-full": Way(ranks=(4,), parallel={"shard_ranks": 2, "activation_checkpointing": "full"}),
    "selective": Way(ranks=(2,), per_micro_batch=1, parallel={"activation_checkpointing": "selective"}),
    "copies-reducing": Way(ranks=(4,), per_micro_batch=1, parallel={"shard_ranks": 2, "reduce_each_micro_batch": True}),
    "compiled-full": Way(
        ranks=(2,), per_micro_batch=1, is_compiled=True, parallel={"activation_checkpointing": "full"}
    ),
    "averaging": Way(ranks=(1, 2, 4), hashes={"table_size": 3, "omit_partial": True, "average": True}),
}


def documents() -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Framed documents of random bytes."""
    generator = np.random.default_rng(0)
    sizes = (50, 60, 70, 40, 30, 80, 90, 20)
    return [np.concatenate([[1], generator.integers(4, 80, size=size), [2]]) for size in sizes]


def micro_batch(step: int, first: int, count: int, *, patched: bool) -> tuple[PackedBatch, Tensor]:
    """Documents [first, first + count) of a step's batch, in shapes that depend on their count alone."""
    order = np.random.default_rng(step).permutation(DOCUMENTS)[first : first + count]
    chosen = [documents()[index] for index in order]
    lengths = [np.array([1, *[3] * ((len(item) - 1) // 3), (len(item) - 1) % 3]) for item in chosen]
    batch, wanted = pack_documents(
        chosen,
        [row[row > 0] for row in lengths] if patched else None,
        num_tokens=100 * count,
        num_documents=2 * count,
        num_patches=50 * count if patched else None,
    )
    # As the loader's, where shapes are static: what only speed depends on is the same for all.
    return dataclasses.replace(batch, max_document_tokens=None, max_document_patches=None), wanted


class Job:
    """A model in training."""

    def __init__(self, way: Way, runtime: Runtime) -> None:
        self.way, self.runtime = way, runtime
        patched = way.preset.startswith("blt")
        self.patched = patched
        self.config = config_of(way)
        overrides = {"hash_embedding": way.hashes} if patched else {}
        architecture = preset(way.preset, **overrides)
        self.model, deviations = empty_model(architecture, self.config, runtime.device, runtime.mesh)
        fill_weights(self.model, deviations, seed=5)
        if way.is_compiled:
            compile_blocks(self.model, backend="aot_eager")
        self.optimizer = make_optimizer(self.model, self.config.optimizer)

    def accumulate(self, step: int) -> Tensor:
        """Run this rank's micro batches; return their summed loss."""
        per, world, rank = self.way.per_micro_batch, self.runtime.world_size, self.runtime.rank
        count = DOCUMENTS // (per * world)
        targets = sum(len(item) - 1 for item in documents())
        total = torch.zeros((), dtype=torch.float64)
        for index in range(count):
            begin_micro_batch(self.model, self.config.parallel, is_last=index == count - 1)
            batch, wanted = micro_batch(step, (index * world + rank) * per, per, patched=self.patched)
            loss = cross_entropy_sum(self.model(batch), wanted)
            (loss / targets).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total / targets

    def update(self, loss: Tensor) -> tuple[float, float]:
        """Clip and update; return the loss and the gradient's norm."""
        parameters = list(self.model.parameters())
        if self.runtime.world_size == 1:
            result = loss.item(), float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        else:
            total, squares = self.runtime.sum(torch.stack([loss, square_sum(parameters, loss.device)]))
            clip(parameters, squares**0.5, 1.0)
            result = total, squares**0.5
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result


def config_of(way: Way) -> TrainConfig:
    """A config that says how to spread."""
    parallel = ParallelConfig(timeout_seconds=60, **way.parallel)
    return TrainConfig(
        run="run", model=ModelConfig(preset=way.preset), data=DataConfig(train="data"), parallel=parallel
    )


def digest(tensors: dict[str, Tensor]) -> str:
    """A digest of names and bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def run_way(name: str, way: Way, runtime: Runtime, output: Path) -> None:
    """Run one way and write what it gave."""
    torch.compiler.reset()
    job = Job(way, runtime)
    initial = digest({name: whole(parameter) for name, parameter in job.model.named_parameters()})
    held = sum(local_rows(parameter).numel() for parameter in job.model.parameters())
    steps, gradients = [], {}
    for step in range(STEPS):
        loss = job.accumulate(step)
        if step == 0:
            for key, parameter in job.model.named_parameters():
                if parameter.grad is None:
                    raise AssertionError(f"{key} has no gradient")
                gradients[key] = whole(parameter.grad).clone()
        steps.append(job.update(loss))
    holds = [0.0] * runtime.world_size
    holds[runtime.rank] = float(held)
    holds = runtime.sum(holds)
    if runtime.is_main:
        place = output / f"{name}-{runtime.world_size}"
        result = {"initial": initial, "holds": holds, "steps": steps}
        place.with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")
        save_file(gradients, place.with_suffix(".safetensors"))


def main(output: Path) -> None:
    """Run everything."""
    # A port each: who is early would join the job before.
    ports = {name: str(free_port()) for name in WAYS}
    for ranks in (1, 2, 4):

        def body(ranks: int = ranks) -> None:
            torch.set_num_threads(1)
            for name, way in WAYS.items():
                if ranks in way.ranks:
                    os.environ["MASTER_PORT"] = ports[name]
                    with open_runtime(config_of(way)) as runtime:
                        run_way(name, way, runtime, output)
            if dist.is_initialized():
                raise AssertionError("the runtime left a process group behind")

        codes = run_ranks(ranks, body)
        if any(codes):
            raise SystemExit(f"{ranks} ranks ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
