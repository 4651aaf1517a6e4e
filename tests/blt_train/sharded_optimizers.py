"""A program of four ranks: optimizers and the average of weights on sharded parameters against those on whole ones.

Prints one line, `agree MESH OPTIMIZER` for each of either, on rank 0.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
import torch.distributed as dist
from tests.blt_train.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from blt_model import BLT, BLTConfig, preset
from blt_train.config import DataConfig, ModelConfig, OptimizerConfig, OptimizerName, ParallelConfig, TrainConfig
from blt_train.inputs import architecture_of_config
from blt_train.optim import WeightAverage, make_optimizer
from blt_train.parallel.mesh import make_mesh
from blt_train.parallel.rows import local_rows, rows_of
from blt_train.parallel.sharding import shard_model
from blt_train.planning.memory import MemoryModel

# Widths that no number of ranks divides; a table of 65 rows has a rank with a single row or none.
OVERRIDES = {"hash_embedding": {"table_size": 13, "ngram_sizes": [2, 3, 4, 5, 6]}, "latent": {"ffn_dim": 19}}


def fresh_model() -> BLT:
    """The same on every rank."""
    torch.manual_seed(0)
    config = preset("blt-debug", **OVERRIDES)
    if not isinstance(config, BLTConfig):
        raise TypeError("blt-debug is a BLT")
    return BLT(config)


def give_gradients(model: nn.Module, step: int) -> None:
    """Equal gradients whether parameters are sharded or not."""
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + index)
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def fill_from(sharded: nn.Module, plain: nn.Module) -> None:
    """Hash tables lie by rows of their own making; take the same numbers for all."""
    for target, source in zip(sharded.parameters(), plain.parameters(), strict=True):
        rows = rows_of(target)
        local_rows(target).detach().copy_(source.detach()[rows.first : rows.end])


def check_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    config: OptimizerConfig,
    mesh: DeviceMesh,
) -> None:
    """The first rank, which has as many rows as any, holds what the plan says, to the byte."""
    if dist.get_rank() != 0:
        return
    tensors = [*model.parameters(), *average.tensors.values()]
    tensors += [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    held = sum(local_rows(tensor).numel() * tensor.element_size() for tensor in tensors)
    run = TrainConfig(
        run="run",
        model=ModelConfig(preset="blt-debug", overrides=OVERRIDES),
        data=DataConfig(train="data"),
        optimizer=dataclasses.replace(config, ema_decay=0.5),
        parallel=ParallelConfig(shard_ranks=mesh.size(mesh.ndim - 1)),
    )
    planned = sum(MemoryModel(architecture_of_config(run), run, dist.get_world_size()).state().values())
    if held != planned:
        raise SystemExit(f"{config.name} {mesh}: holds {held} bytes where {planned} are planned")


def whole(tensor: Tensor) -> Tensor:
    """All rows."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(mesh: DeviceMesh, name: OptimizerName) -> None:
    """Three steps on both, the optimizer of the sharded one loaded from its own state before the last."""
    config = OptimizerConfig(name=name, learning_rate=0.01, embedding_weight_decay=0.1)
    plain, sharded = fresh_model(), fresh_model()
    shard_model(sharded, mesh, ParallelConfig())
    fill_from(sharded, plain)
    optimizers = [make_optimizer(model, config) for model in (plain, sharded)]
    averages = [WeightAverage(model, 0.5) for model in (plain, sharded)]
    for step in range(1, 4):
        if step == 3:
            state = optimizers[1].state_dict()
            optimizers[1] = make_optimizer(sharded, config)
            optimizers[1].load_state_dict(state)
            average = WeightAverage(sharded, 0.5)
            average.load(averages[1].tensors)
            averages[1] = average
        for model, optimizer, average in zip((plain, sharded), optimizers, averages, strict=True):
            give_gradients(model, step)
            optimizer.step()
            average.update(step)
    check_memory(sharded, optimizers[1], averages[1], config, mesh)
    for (key, expected), (other, found) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        if key != other or not torch.equal(expected, whole(found)):
            raise SystemExit(f"{name} {mesh}: {key} differs")
        if not torch.equal(averages[0].tensors[key], whole(averages[1].tensors[key])):
            raise SystemExit(f"{name} {mesh}: the average of {key} differs")
        for moment, value in optimizers[0].state[expected].items():
            if not torch.equal(value, whole(optimizers[1].state[found][moment])):
                raise SystemExit(f"{name} {mesh}: {moment} of {key} differs")


def main() -> None:
    """Compare on all meshes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    meshes = {
        "sharded": make_mesh(torch.device("cpu"), 4, 4),
        "replicated": make_mesh(torch.device("cpu"), 4, 2),
    }
    for label, mesh in meshes.items():
        for name in OptimizerName:
            compare(mesh, name)
            if dist.get_rank() == 0:
                print(f"agree {label} {name}", flush=True)  # noqa: T201  # what the test reads
    dist.destroy_process_group()


if __name__ == "__main__":
    codes = run_ranks(4, main)
    sys.exit(f"the ranks ended with {codes}" if any(codes) else 0)
