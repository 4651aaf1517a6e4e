"""Reductions over the patches of a packed batch, and the two cross-attentions, without padding or masks.

Patches are segments: runs of neighbouring positions. Every function here is linear in tokens, reads sizes from shapes
only, and has its own backward, which gathers again what the forward gathered: what is kept between the two is no
larger than the inputs (but for the attention weights, k numbers for each token and head). On the CPU the gathered
vectors are made and used piece by piece, and never lie in memory as a whole.

Sums over runs come out the same in every run of a program: on CUDA each is taken by itself, in order, not by atomic
additions.

Legend: T tokens, P patches, K vectors of a patch, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blt_model.fused import in_pieces, pieces
from blt_model.packed import segment_of


@dataclass(frozen=True, slots=True)
class Segments:
    """A partition of T positions into P runs, some of them empty."""

    ids: Tensor
    """int64 [T], never decreasing: the run that holds a position."""
    count: int
    """P."""

    @classmethod
    def from_offsets(cls, offsets: Tensor, length: int) -> Segments:
        """Runs given by their ends.

        Args:
            offsets: int32 [P + 1], from 0 to length.
            length: T.
        """
        return cls(segment_of(offsets, length), offsets.shape[0] - 1)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, in which sums and exponentials are taken."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(values: Tensor, ids: Tensor, count: int, total: Tensor | None = None) -> Tensor:
    """Sum [T, ...] over runs to [P, ...], in at least float32, and to `total` where there is one."""
    values = _wide(values)
    if total is None and values.device.type == "cuda":
        offsets = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
        return torch.segment_reduce(values.contiguous(), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    total = values.new_zeros((count, *values.shape[1:])) if total is None else total
    return total.index_add_(0, ids, values)


def _rows(tensor: Tensor, width: int) -> Iterator[slice]:
    """The rows of a tensor in pieces, for work on `width` numbers for each; in one piece off the CPU."""
    return pieces(len(tensor), width) if in_pieces(tensor) and len(tensor) else iter((slice(None),))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _some(total: Tensor | None) -> Tensor:
    """What was summed: there is always a piece of rows, if an empty one."""
    if total is None:
        raise RuntimeError("no rows were summed")
    return total


def _maximum(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Largest of [T, ...] over runs, [P, ...]; 0 for empty ones."""
    flat = values.flatten(1)
    result = flat.new_zeros((count, flat.shape[1]))
    result.scatter_reduce_(0, ids[:, None].expand_as(flat), flat, "amax", include_self=False)
    return result.view(count, *values.shape[1:])


class _SegmentMaximum(torch.autograd.Function):
    """Where several positions hold the largest value, each gets an equal share of the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, count: int) -> Tensor:
        result = _maximum(values, ids, count)
        ctx.save_for_backward(values, result, ids)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        values, result, ids = ctx.saved_tensors
        largest = values == result[ids]
        share = _wide(gradients[0]) / _sum(largest, ids, len(result)).clamp_(min=1)
        return torch.where(largest, share[ids], 0).to(values.dtype), None, None


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(ids)
        return _sum(values, ids, count).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None


def segment_max(values: Tensor, segments: Segments) -> Tensor:
    """Largest value of every run.

    Args:
        values: [T, ...].
        segments: the runs.

    Returns:
        [P, ...], 0 for empty runs. The gradient is shared equally among positions that tie.
    """
    result: Tensor = _SegmentMaximum.apply(values, segments.ids, segments.count)
    return result


def segment_mean(values: Tensor, segments: Segments) -> Tensor:
    """Mean of every run.

    Args:
        values: [T, dim].
        segments: the runs.

    Returns:
        [P, dim], 0 for empty runs.
    """
    ones = torch.ones(len(segments.ids), dtype=torch.float32, device=values.device)
    sizes = _sum(ones, segments.ids, segments.count).clamp_(min=1)
    total: Tensor = _SegmentSum.apply(values, segments.ids, segments.count)
    return (total / sizes[:, None]).to(values.dtype)


class _PatchesReadBytes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> Tensor:
        count, width = len(query), query[:1].numel()
        parts = [_wide((query[ids[rows]] * key[rows, None]).sum(-1)) for rows in _rows(key, width)]
        scores = _joined(parts) * query.shape[-1] ** -0.5
        weights = (scores - _maximum(scores, ids, count)[ids]).exp_()
        weights = weights / _sum(weights, ids, count)[ids]
        ctx.save_for_backward(query, key, value, ids, weights)
        mixed: Tensor | None = None
        for rows in _rows(key, width):
            part = weights[rows].to(value.dtype)[..., None] * value[rows, None]
            mixed = _sum(part, ids[rows], count, mixed)
        return _some(mixed).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, ids, weights = ctx.saved_tensors
        count, width = len(query), query[:1].numel()
        weights_gradients, value_gradients, key_gradients = [], [], []
        for rows in _rows(key, width):
            gradient = gradients[0][ids[rows]]
            weights_gradients.append(_wide((gradient * value[rows, None]).sum(-1)))
            value_gradients.append((weights[rows].to(value.dtype)[..., None] * gradient).sum(1))
        weights_gradient = _joined(weights_gradients)
        mean = _sum(weights * weights_gradient, ids, count)[ids]
        scores = (weights * (weights_gradient - mean) * query.shape[-1] ** -0.5).to(query.dtype)[..., None]
        query_gradient: Tensor | None = None
        for rows in _rows(key, width):
            query_gradient = _sum(scores[rows] * key[rows, None], ids[rows], count, query_gradient)
            key_gradients.append((scores[rows] * query[ids[rows]]).sum(1))
        return _some(query_gradient).to(query.dtype), _joined(key_gradients), _joined(value_gradients), None


class _BytesReadPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> Tensor:
        mixed, weights = [], []
        for rows in _rows(query, key[:1].numel()):
            scores = _wide((query[rows, None] * key[ids[rows]]).sum(-1)) * query.shape[-1] ** -0.5
            weights.append(scores.softmax(dim=1))
            mixed.append((weights[-1].to(value.dtype)[..., None] * value[ids[rows]]).sum(1))
        ctx.save_for_backward(query, key, value, ids, _joined(weights))
        return _joined(mixed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, ids, weights = ctx.saved_tensors
        count = len(key)
        query_gradients = []
        key_gradient: Tensor | None = None
        value_gradient: Tensor | None = None
        for rows in _rows(query, key[:1].numel()):
            gradient, weight = gradients[0][rows, None], weights[rows]
            weights_gradient = _wide((gradient * value[ids[rows]]).sum(-1))
            mean = (weight * weights_gradient).sum(1, keepdim=True)
            scores = (weight * (weights_gradient - mean) * query.shape[-1] ** -0.5).to(query.dtype)[..., None]
            query_gradients.append((scores * key[ids[rows]]).sum(1))
            key_gradient = _sum(scores * query[rows, None], ids[rows], count, key_gradient)
            part = weight.to(value.dtype)[..., None] * gradient
            value_gradient = _sum(part, ids[rows], count, value_gradient)
        key_gradient, value_gradient = _some(key_gradient).to(key.dtype), _some(value_gradient).to(value.dtype)
        return _joined(query_gradients), key_gradient, value_gradient, None


def patches_read_bytes(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Attention of a patch's K vectors to the bytes of that patch.

    Args:
        query: [P, K, H, E].
        key: [T, H, E].
        value: [T, H, E].
        segments: the patch that holds each byte.

    Returns:
        [P, K, H, E]; 0 for empty patches.
    """
    result: Tensor = _PatchesReadBytes.apply(query, key, value, segments.ids)
    return result


def bytes_read_patches(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Attention of every byte to the K vectors of one patch.

    Args:
        query: [T, H, E].
        key: [P, K, H, E].
        value: [P, K, H, E].
        segments: the patch that each byte reads.

    Returns:
        [T, H, E].
    """
    result: Tensor = _BytesReadPatches.apply(query, key, value, segments.ids)
    return result
