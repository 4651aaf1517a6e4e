"""Which rows of a sharded tensor lie on which rank.

All sharding here is along dimension 0: the rows are cut as `torch.chunk` cuts them, over one axis of the mesh after
another. Whoever fills, reads or writes shards asks here rather than reckons for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """This rank's part of a tensor."""

    first: int
    """First row of the whole tensor that lies here."""

    end: int
    """The row after the last; equal to `first` where nothing lies here."""

    is_first_copy: bool
    """Whether this rank holds the first of several copies of these rows: the one that is written or counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardGroup:
    """Ranks that share one copy of a tensor; its rows lie in the order of the ranks."""

    counts: tuple[int, ...]
    """Rows of each rank, some perhaps 0."""

    rank: int
    """This process's place in the group."""

    group: dist.ProcessGroup
    """The ranks."""


def chunk(first: int, end: int, parts: int, index: int) -> tuple[int, int]:
    """Return part `index` of rows [first, end) cut into `parts`, as `torch.chunk` cuts them; late parts may be empty.

    Args:
        first: first row.
        end: the row after the last.
        parts: how many parts.
        index: which of them, from 0.
    """
    size = -(-(end - first) // parts)
    return min(first + index * size, end), min(first + (index + 1) * size, end)


def rows_of(tensor: Tensor) -> Rows:
    """Return which rows of a tensor lie on this rank.

    Args:
        tensor: a plain tensor, which is here as a whole, or a DTensor whose placements are `Replicate` and `Shard(0)`.
            A scalar counts as one row.

    Raises:
        ValueError: it is sharded otherwise.
    """
    length = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return Rows(first=0, end=length, is_first_copy=True)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this rank is not in the tensor's mesh")
    first, end, is_first_copy = 0, length, True
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            is_first_copy = is_first_copy and coordinate[axis] == 0
        elif isinstance(placement, Shard) and placement.dim == 0:
            first, end = chunk(first, end, tensor.device_mesh.size(axis), coordinate[axis])
        else:
            raise ValueError(f"a tensor is placed as {placement}; only Replicate and Shard(0) are known here")
    return Rows(first=first, end=end, is_first_copy=is_first_copy)


def shard_group(tensor: Tensor) -> ShardGroup | None:
    """Return the ranks that share one copy of a tensor; None where every rank has all of it.

    Args:
        tensor: plain, or a DTensor sharded by rows over one mesh axis and replicated over the others.

    Raises:
        ValueError: it is sharded otherwise.
    """
    if not isinstance(tensor, DTensor):
        return None
    axes = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not axes:
        return None
    if len(axes) > 1 or not tensor.placements[axes[0]].is_shard(0):
        raise ValueError(f"a parameter is sharded as {tensor.placements}; it must be by rows over one mesh axis")
    mesh = tensor.device_mesh
    offsets = row_offsets(tensor.shape[0], [mesh.size(axes[0])])
    counts = tuple(end - first for first, end in itertools.pairwise(offsets))
    return ShardGroup(counts=counts, rank=mesh.get_local_rank(axes[0]), group=mesh.get_group(axes[0]))


def local_rows(tensor: Tensor) -> Tensor:
    """Return the rows that lie on this rank, sharing their storage; of a plain tensor, itself.

    Args:
        tensor: plain, or a DTensor.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a detached tensor with all its rows; for a DTensor all ranks of its mesh must call this together.

    Args:
        tensor: plain, or a DTensor.
    """
    detached = tensor.detach()
    if not isinstance(detached, DTensor):
        return detached
    shards = [axis for axis, placement in enumerate(detached.placements) if not placement.is_replicate()]
    if len(shards) <= 1:
        return detached.full_tensor()
    # torch would gather over one axis after the other.
    local, offsets = detached.to_local(), row_offsets(detached.shape[0], tuple(detached.device_mesh.shape))
    counts = [end - first for first, end in itertools.pairwise(offsets)]
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: len(local)] = local
    gathered = local.new_empty(len(counts) * max(counts), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    parts = gathered.view(len(counts), max(counts), *local.shape[1:])
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def row_offsets(rows: int, shape: Sequence[int]) -> list[int]:
    """Return the first row of every rank where all axes of a mesh cut the rows, and the number of rows at the end.

    Args:
        rows: of the whole tensor.
        shape: of the mesh.

    Returns:
        One number more than there are ranks; they never fall.
    """
    parts = [(0, rows)]
    for size in shape:
        parts = [chunk(first, end, size, index) for first, end in parts for index in range(size)]
    return [first for first, _ in parts] + [rows]


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's rows of a whole tensor, placed as another one is.

    Args:
        tensor: plain, with all rows, on any device.
        like: of the same shape: plain or a DTensor.
    """
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    rows = rows_of(like)
    local = tensor[rows.first : rows.end].clone().to(like.device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
