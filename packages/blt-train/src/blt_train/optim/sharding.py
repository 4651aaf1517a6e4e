"""How a parameter lies on the ranks: whole, or by rows as FSDP2 shards it.

`torch.distributed.tensor` takes seconds to import, and one process has no use for it, so that sharded tensors are told
by what they can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rank of a shard group holds which rows of a matrix; they lie in the order of the ranks."""

    counts: tuple[int, ...]
    """Rows of each rank, some perhaps 0."""
    rank: int
    """This process's place in the group."""
    group: dist.ProcessGroup
    """The ranks that share one copy of the matrix."""


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory; a plain tensor is its own part.

    Args:
        tensor: plain, or a DTensor.
    """
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    part: Tensor = to_local()
    return part


def rows_of(tensor: Tensor) -> Rows | None:
    """Return how a tensor's rows lie on the ranks; None where every rank has all of them.

    Args:
        tensor: plain, or a DTensor sharded by rows over one mesh axis and replicated over the others.

    Raises:
        ValueError: it is sharded otherwise.
    """
    if not hasattr(tensor, "to_local"):
        return None
    sharded: Any = tensor
    axes = [axis for axis, placement in enumerate(sharded.placements) if not placement.is_replicate()]
    if not axes:
        return None
    if len(axes) > 1 or not sharded.placements[axes[0]].is_shard(0):
        raise ValueError(f"a parameter is sharded as {sharded.placements}; it must be by rows over one mesh axis")
    mesh = sharded.device_mesh
    width = mesh.size(axes[0])
    # Sharding cuts as torch.chunk does.
    most = -(-tensor.shape[0] // width)
    counts = tuple(max(0, min(most, tensor.shape[0] - rank * most)) for rank in range(width))
    return Rows(counts, mesh.get_local_rank(axes[0]), mesh.get_group(axes[0]))
