"""How far an optimizer step moves the weights: the norm of their change, whatever the optimizer.

The weights are copied before the update and compared after it. The copy lives during the update alone, when no
activation does, so it seldom raises the peak of memory; it reads and writes each weight a few times, as the optimizer
does. Sharded weights (DTensors) are compared shard by shard, and one number per rank is summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from blt_train.runtime import Runtime


def local_part(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter, in the same memory.

    Args:
        parameter: a plain tensor, which is its own part, or a DTensor.
    """
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def copies_of(parameter: Tensor, world_size: int) -> float:
    """Return how many ranks hold each element of a parameter.

    Args:
        parameter: a plain tensor, which all ranks hold, or a DTensor.
        world_size: number of ranks.
    """
    if not isinstance(parameter, DTensor):
        return float(world_size)
    mesh = parameter.device_mesh
    shards = math.prod(mesh.size(axis) for axis, kind in enumerate(parameter.placements) if isinstance(kind, Shard))
    return world_size / shards


class UpdateNorm:
    """Measures one update: made before it, asked after it."""

    def __init__(self, parameters: Iterable[nn.Parameter], runtime: Runtime) -> None:
        """Copy this rank's part of the weights.

        Args:
            parameters: all that the update may move, the same on every rank.
            runtime: this process's place.
        """
        self._parameters = list(parameters)
        self._runtime = runtime
        self._before = [local_part(parameter).clone() for parameter in self._parameters]

    @torch.no_grad()
    def norm(self) -> float:
        """Return the 2-norm of the change of all weights since; every rank calls it, once, and gets the same number."""
        by_copies: dict[float, list[Tensor]] = {}
        for parameter, before in zip(self._parameters, self._before, strict=True):
            before.sub_(local_part(parameter))
            by_copies.setdefault(copies_of(parameter, self._runtime.world_size), []).append(before)
        total = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        for copies, changes in by_copies.items():
            # What several ranks hold is counted by each of them.
            total += _square_sum(changes) / copies
        self._before = []
        return math.sqrt(self._runtime.sum(total.reshape(1))[0])


def _square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the float64 sum of the squares of all elements; an empty shard adds nothing."""
    return nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()]).double().square()
