"""Which rows of a sharded tensor lie on which rank.

All sharding here is along dimension 0: the rows are cut as `torch.chunk` cuts them, over one axis of the mesh after
another. Whoever fills, reads or writes shards asks here rather than reckons for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
    with torch.no_grad():
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
