"""The Triton kernels over segments as operations of torch.

Each has a fake implementation and a backward, so that compiled code calls it as it is and recomputation can keep what
it gives. Nothing waits for the GPU, shapes follow from shapes, and a CUDA graph can hold a call. Triton is loaded by
the first call. All results are contiguous.

Legend: T positions (bytes), P segments (patches), K vectors of a patch, H heads, E head width.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _pooling() -> ModuleType:
    from blt_model import segment_kernels

    return segment_kernels


@functools.cache
def _attention() -> ModuleType:
    from blt_model import cross_kernels

    return cross_kernels


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


@torch.library.custom_op(
    "blt_model::bytes_read_patches",
    mutates_args=(),
    schema="(Tensor query, Tensor key_value, Tensor ids, Tensor offsets) -> Tensor",
)
def bytes_read(query: Tensor, key_value: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Attention of every byte to the vectors of one patch.

    Args:
        query: [T, H, E] of float16, bfloat16 or float32.
        key_value: [P, K, 2, H, E], the keys first.
        ids: int64 [T], never decreasing: the patch that a byte reads.
        offsets: int32 [P + 1]: where the bytes of each patch begin.

    Returns:
        [T, H, E].
    """
    result: Tensor = _attention().bytes_read(*_contiguous(query, key_value, ids, offsets))
    return result


@bytes_read.register_fake
def _(query: Tensor, key_value: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op(
    "blt_model::bytes_read_patches_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor query, Tensor key_value, Tensor ids, Tensor offsets) -> (Tensor, Tensor)",
)
def _bytes_read_backward(upstream: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _attention().bytes_read_gradient(*_contiguous(upstream, *saved))
    return result


@_bytes_read_backward.register_fake
def _(upstream: Tensor, query: Tensor, key_value: Tensor, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key_value.new_empty(key_value.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_bytes_read(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return *_bytes_read_backward(upstream, *ctx.saved_tensors), None, None


bytes_read.register_autograd(_differentiate_bytes_read, setup_context=_save_inputs)


@torch.library.custom_op(
    "blt_model::patches_read_bytes",
    mutates_args=(),
    schema="(Tensor query, Tensor key_value, Tensor ids, Tensor offsets) -> (Tensor, Tensor)",
)
def patches_read(query: Tensor, key_value: Tensor, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of a patch's vectors to the bytes of that patch.

    Args:
        query: [P, K, H, E] of float16, bfloat16 or float32.
        key_value: [T, 2, H, E], the keys first.
        ids: int64 [T], never decreasing: the patch that holds a byte.
        offsets: int32 [P + 1]: where each patch begins.

    Returns:
        [P, K, H, E], 0 for empty patches; and what the backward needs, float32 [P, K, H], without gradient.
    """
    result: tuple[Tensor, Tensor] = _attention().patches_read(*_contiguous(query, key_value, ids, offsets))
    return result


@patches_read.register_fake
def _(query: Tensor, key_value: Tensor, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "blt_model::patches_read_bytes_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor query, Tensor key_value, Tensor ids, Tensor offsets, Tensor output, Tensor sums) "
    "-> (Tensor, Tensor)",
)
def _patches_read_backward(upstream: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _attention().patches_read_gradient(*_contiguous(upstream, *saved))
    return result


@_patches_read_backward.register_fake
def _(upstream: Tensor, query: Tensor, key_value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key_value.new_empty(key_value.shape)


def _save_reading(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_patches_read(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return None, None, None, None
    return *_patches_read_backward(upstream, *ctx.saved_tensors), None, None


patches_read.register_autograd(_differentiate_patches_read, setup_context=_save_reading)


@torch.library.custom_op(
    "blt_model::segment_maximum", mutates_args=(), schema="(Tensor values, Tensor ids, Tensor offsets) -> Tensor"
)
def maximum(values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Largest values of segments.

    Args:
        values: [T, ...] of float16, bfloat16 or float32.
        ids: int64 [T], never decreasing: the segment that holds a position.
        offsets: int32 [P + 1]: where each segment begins.

    Returns:
        [P, ...], 0 for empty segments; positions that tie share the gradient equally.
    """
    result: Tensor = _pooling().maximum(*_contiguous(values, ids, offsets))
    return result


@maximum.register_fake
def _(values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty((offsets.shape[0] - 1, *values.shape[1:]))


@torch.library.custom_op(
    "blt_model::segment_maximum_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor values, Tensor result, Tensor ids, Tensor offsets) -> Tensor",
)
def _maximum_backward(upstream: Tensor, *saved: Tensor) -> Tensor:
    result: Tensor = _pooling().maximum_gradient(*_contiguous(upstream, *saved))
    return result


@_maximum_backward.register_fake
def _(upstream: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
    return values.new_empty(values.shape)


def _save_maximum(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    values, ids, offsets = inputs
    ctx.save_for_backward(values, output, ids, offsets)


def _differentiate_maximum(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _maximum_backward(upstream, *ctx.saved_tensors), None, None


maximum.register_autograd(_differentiate_maximum, setup_context=_save_maximum)


@torch.library.custom_op(
    "blt_model::segment_mean", mutates_args=(), schema="(Tensor values, Tensor ids, Tensor offsets) -> Tensor"
)
def mean(values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Means of segments; otherwise as `maximum`."""
    result: Tensor = _pooling().mean(*_contiguous(values, ids, offsets))
    return result


@mean.register_fake
def _(values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty((offsets.shape[0] - 1, *values.shape[1:]))


@torch.library.custom_op(
    "blt_model::segment_mean_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor ids, Tensor offsets) -> Tensor",
)
def _mean_backward(upstream: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    result: Tensor = _pooling().mean_gradient(*_contiguous(upstream, ids, offsets))
    return result


@_mean_backward.register_fake
def _(upstream: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    return upstream.new_empty((ids.shape[0], *upstream.shape[1:]))


def _save_segments(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_mean(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _mean_backward(upstream, *ctx.saved_tensors), None, None


mean.register_autograd(_differentiate_mean, setup_context=_save_segments)
