"""Reductions over the patches of a packed batch, and the two cross-attentions, without padding or masks.

Patches are segments: runs of neighbouring positions. Every function here is linear in tokens, reads sizes from shapes
only, and keeps nothing for its backward that is larger than its inputs (but off CUDA the attention weights, K numbers
for each token and head). On CUDA, Triton kernels read every input once and write every output once. Elsewhere, in
float64 and where triton is missing, torch's operations do it: backwards gather again what forwards gathered, and on the
CPU the gathered vectors are made and used piece by piece, and never lie in memory as a whole.

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

from blt_model import segment_operators
from blt_model.fused import in_pieces, pieces
from blt_model.packed import segment_of
from blt_model.triton_support import takes_kernels


@dataclass(frozen=True, slots=True)
class Segments:
    """A partition of T positions into P runs, some of them empty; made once for all layers that share it."""

    ids: Tensor
    """int64 [T], never decreasing: the run that holds a position."""
    offsets: Tensor
    """int32 [P + 1]: run p holds positions offsets[p] to offsets[p + 1]; the last equals T."""

    @property
    def count(self) -> int:
        """P."""
        return self.offsets.shape[0] - 1

    @classmethod
    def from_offsets(cls, offsets: Tensor, length: int) -> Segments:
        """Runs given by their ends.

        Args:
            offsets: int32 [P + 1], from 0 to length.
            length: T.
        """
        return cls(segment_of(offsets, length), offsets)

    @classmethod
    def from_ids(cls, ids: Tensor, count: int) -> Segments:
        """Runs given by the positions that they hold.

        Args:
            ids: int64 [T], never decreasing, each less than count.
            count: P.
        """
        runs = torch.arange(count + 1, device=ids.device, dtype=ids.dtype)
        return cls(ids, torch.searchsorted(ids, runs, out_int32=True))


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, in which sums and exponentials are taken."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(values: Tensor, ids: Tensor, offsets: Tensor, total: Tensor | None = None) -> Tensor:
    """Sum [T, ...] over runs to [P, ...], in at least float32, and to `total` where there is one."""
    values = _wide(values)
    if total is None and values.device.type == "cuda":
        return torch.segment_reduce(values.contiguous(), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
    total = values.new_zeros((offsets.shape[0] - 1, *values.shape[1:])) if total is None else total
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
    def forward(ctx: Any, values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        result = _maximum(values, ids, len(offsets) - 1)
        ctx.save_for_backward(values, result, ids, offsets)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        values, result, ids, offsets = ctx.saved_tensors
        largest = values == result[ids]
        share = _wide(gradients[0]) / _sum(largest, ids, offsets).clamp_(min=1)
        return torch.where(largest, share[ids], 0).to(values.dtype), None, None


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        return _sum(values, ids, offsets).to(values.dtype)

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
    if takes_kernels(values):
        result: Tensor = segment_operators.maximum(values, segments.ids, segments.offsets)
        return result
    return segment_max_by_steps(values, segments)


def segment_max_by_steps(values: Tensor, segments: Segments) -> Tensor:
    """As `segment_max`, by torch's own operations."""
    result: Tensor = _SegmentMaximum.apply(values, segments.ids, segments.offsets)
    return result


def segment_mean(values: Tensor, segments: Segments) -> Tensor:
    """Mean of every run.

    Args:
        values: [T, dim].
        segments: the runs.

    Returns:
        [P, dim], 0 for empty runs.
    """
    if takes_kernels(values):
        result: Tensor = segment_operators.mean(values, segments.ids, segments.offsets)
        return result
    return segment_mean_by_steps(values, segments)


def segment_mean_by_steps(values: Tensor, segments: Segments) -> Tensor:
    """As `segment_mean`, by torch's own operations."""
    total: Tensor = _SegmentSum.apply(values, segments.ids, segments.offsets)
    return (total / segments.offsets.diff().clamp_(min=1).float()[:, None]).to(values.dtype)


class _PatchesReadBytes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        count, width = len(query), query[:1].numel()
        parts = [_wide((query[ids[rows]] * key[rows, None]).sum(-1)) for rows in _rows(key, width)]
        scores = _joined(parts) * query.shape[-1] ** -0.5
        weights = (scores - _maximum(scores, ids, count)[ids]).exp_()
        weights = weights / _sum(weights, ids, offsets)[ids]
        ctx.save_for_backward(query, key, value, ids, offsets, weights)
        mixed: Tensor | None = None
        for rows in _rows(key, width):
            part = weights[rows].to(value.dtype)[..., None] * value[rows, None]
            mixed = _sum(part, ids[rows], offsets, mixed)
        return _some(mixed).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, ids, offsets, weights = ctx.saved_tensors
        width = query[:1].numel()
        weights_gradients, value_gradients, key_gradients = [], [], []
        for rows in _rows(key, width):
            gradient = gradients[0][ids[rows]]
            weights_gradients.append(_wide((gradient * value[rows, None]).sum(-1)))
            value_gradients.append((weights[rows].to(value.dtype)[..., None] * gradient).sum(1))
        weights_gradient = _joined(weights_gradients)
        mean = _sum(weights * weights_gradient, ids, offsets)[ids]
        scores = (weights * (weights_gradient - mean) * query.shape[-1] ** -0.5).to(query.dtype)[..., None]
        query_gradient: Tensor | None = None
        for rows in _rows(key, width):
            query_gradient = _sum(scores[rows] * key[rows, None], ids[rows], offsets, query_gradient)
            key_gradients.append((scores[rows] * query[ids[rows]]).sum(1))
        return _some(query_gradient).to(query.dtype), _joined(key_gradients), _joined(value_gradients), None, None


class _BytesReadPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        mixed, weights = [], []
        for rows in _rows(query, key[:1].numel()):
            scores = _wide((query[rows, None] * key[ids[rows]]).sum(-1)) * query.shape[-1] ** -0.5
            weights.append(scores.softmax(dim=1))
            mixed.append((weights[-1].to(value.dtype)[..., None] * value[ids[rows]]).sum(1))
        ctx.save_for_backward(query, key, value, ids, offsets, _joined(weights))
        return _joined(mixed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, ids, offsets, weights = ctx.saved_tensors
        query_gradients = []
        key_gradient: Tensor | None = None
        value_gradient: Tensor | None = None
        for rows in _rows(query, key[:1].numel()):
            gradient, weight = gradients[0][rows, None], weights[rows]
            weights_gradient = _wide((gradient * value[ids[rows]]).sum(-1))
            mean = (weight * weights_gradient).sum(1, keepdim=True)
            scores = (weight * (weights_gradient - mean) * query.shape[-1] ** -0.5).to(query.dtype)[..., None]
            query_gradients.append((scores * key[ids[rows]]).sum(1))
            key_gradient = _sum(scores * query[rows, None], ids[rows], offsets, key_gradient)
            part = weight.to(value.dtype)[..., None] * gradient
            value_gradient = _sum(part, ids[rows], offsets, value_gradient)
        key_gradient, value_gradient = _some(key_gradient).to(key.dtype), _some(value_gradient).to(value.dtype)
        return _joined(query_gradients), key_gradient, value_gradient, None, None


def patches_read_bytes(query: Tensor, key_value: Tensor, segments: Segments) -> Tensor:
    """Attention of a patch's K vectors to the bytes of that patch.

    Args:
        query: [P, K, H, E].
        key_value: [T, 2, H, E], keys and values.
        segments: the patch that holds each byte.

    Returns:
        [P, K, H, E]; 0 for empty patches.
    """
    if takes_kernels(query):
        result: Tensor = segment_operators.patches_read(query, key_value, segments.ids, segments.offsets)[0]
        return result
    return patches_read_bytes_by_steps(query, key_value, segments)


def patches_read_bytes_by_steps(query: Tensor, key_value: Tensor, segments: Segments) -> Tensor:
    """As `patches_read_bytes`, by torch's own operations."""
    result: Tensor = _PatchesReadBytes.apply(query, *key_value.unbind(-3), segments.ids, segments.offsets)
    return result


def bytes_read_patches(query: Tensor, key_value: Tensor, segments: Segments) -> Tensor:
    """Attention of every byte to the K vectors of one patch.

    Args:
        query: [T, H, E].
        key_value: [P, K, 2, H, E], keys and values.
        segments: the patch that each byte reads.

    Returns:
        [T, H, E].
    """
    if takes_kernels(query):
        result: Tensor = segment_operators.bytes_read(query, key_value, segments.ids, segments.offsets)
        return result
    return bytes_read_patches_by_steps(query, key_value, segments)


def bytes_read_patches_by_steps(query: Tensor, key_value: Tensor, segments: Segments) -> Tensor:
    """As `bytes_read_patches`, by torch's own operations."""
    result: Tensor = _BytesReadPatches.apply(query, *key_value.unbind(-3), segments.ids, segments.offsets)
    return result
