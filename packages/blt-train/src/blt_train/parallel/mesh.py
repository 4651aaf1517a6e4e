"""The mesh of ranks: one axis for fully sharded weights, two for sharded copies of them.

With `parallel.shard_ranks` = all ranks there is one axis, `shard`. With fewer there are two: `replicate` (slow, between
machines) and `shard` (fast, within one): rank r is copy r // shard_ranks, shard r % shard_ranks, so that neighbouring
ranks, which share a machine, share a copy.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

SHARD_AXIS = "shard"
REPLICATE_AXIS = "replicate"


def make_mesh(device: torch.device, world_size: int, shard_size: int) -> DeviceMesh:
    """Return the mesh of all ranks; the process group must be there, and every rank must call this.

    Args:
        device: whose kind all ranks compute on.
        world_size: number of ranks.
        shard_size: ranks of one copy of the weights; divides the number of ranks.
    """
    if shard_size == world_size:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=(SHARD_AXIS,))
    shape = (world_size // shard_size, shard_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=(REPLICATE_AXIS, SHARD_AXIS))
