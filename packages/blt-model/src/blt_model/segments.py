"""Reductions over the patches of a packed batch, and the two cross-attentions, without padding or masks.

Patches are segments: runs of neighbouring positions. Every function here is linear in tokens, reads sizes from shapes
only, and has its own backward, which gathers again what the forward gathered: what is kept between the two is no
larger than the inputs (but for the attention weights, k numbers for each token and head).

Legend: T tokens, P patches, K vectors of a patch, H heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def _sum(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Sum [T, ...] over runs to [P, ...], in at least float32."""
    values = _wide(values)
    return values.new_zeros((count, *values.shape[1:])).index_add_(0, ids, values)


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
        count = len(query)
        scores = _wide((query[ids] * key[:, None]).sum(-1)) * query.shape[-1] ** -0.5
        weights = (scores - _maximum(scores, ids, count)[ids]).exp_()
        weights = weights / _sum(weights, ids, count)[ids]
        ctx.save_for_backward(query, key, value, ids, weights)
        return _sum(weights.to(value.dtype)[..., None] * value[:, None], ids, count).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, ids, weights = ctx.saved_tensors
        count = len(query)
        gradient = gradients[0][ids]
        weights_gradient = _wide((gradient * value[:, None]).sum(-1))
        mean = _sum(weights * weights_gradient, ids, count)[ids]
        scores = (weights * (weights_gradient - mean) * query.shape[-1] ** -0.5).to(query.dtype)[..., None]
        query_gradient = _sum(scores * key[:, None], ids, count).to(query.dtype)
        key_gradient = (scores * query[ids]).sum(1)
        value_gradient = (weights.to(value.dtype)[..., None] * gradient).sum(1)
        return query_gradient, key_gradient, value_gradient, None


class _BytesReadPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> Tensor:
        scores = _wide((query[:, None] * key[ids]).sum(-1)) * query.shape[-1] ** -0.5
        weights = scores.softmax(dim=1)
        ctx.save_for_backward(query, key, value, ids, weights)
        mixed: Tensor = (weights.to(value.dtype)[..., None] * value[ids]).sum(1)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, ids, weights = ctx.saved_tensors
        count = len(key)
        gradient = gradients[0][:, None]
        weights_gradient = _wide((gradient * value[ids]).sum(-1))
        mean = (weights * weights_gradient).sum(1, keepdim=True)
        scores = (weights * (weights_gradient - mean) * query.shape[-1] ** -0.5).to(query.dtype)[..., None]
        query_gradient = (scores * key[ids]).sum(1)
        key_gradient = _sum(scores * query[:, None], ids, count).to(key.dtype)
        value_gradient = _sum(weights.to(value.dtype)[..., None] * gradient, ids, count).to(value.dtype)
        return query_gradient, key_gradient, value_gradient, None


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
