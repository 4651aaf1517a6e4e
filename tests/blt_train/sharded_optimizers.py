"""Run by torchrun: optimizers and the average of weights on sharded parameters against those on whole ones.

Prints one line, `agree MESH` for every mesh, on rank 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from blt_model import BLT, BLTConfig, preset
from blt_train.config import OptimizerConfig, OptimizerName
from blt_train.optim import WeightAverage, make_optimizer

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


def whole(tensor: Tensor) -> Tensor:
    """All rows."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(mesh: DeviceMesh, name: OptimizerName) -> None:
    """Three steps on both, the optimizer of the sharded one loaded from its own state before the last."""
    config = OptimizerConfig(name=name, learning_rate=0.01, embedding_weight_decay=0.1)
    plain, sharded = fresh_model(), fresh_model()
    for block in sharded.latent.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
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
    dist.init_process_group("gloo")
    meshes = {
        "sharded": init_device_mesh("cpu", (4,)),
        "replicated": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
    }
    for label, mesh in meshes.items():
        for name in OptimizerName:
            compare(mesh, name)
            if dist.get_rank() == 0:
                print(f"agree {label} {name}", flush=True)  # noqa: T201  # what the test reads
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
