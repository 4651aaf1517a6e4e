"""What a block does between its products, as operations of their own on CUDA; see `pointwise_kernels`.

To torch each is one operation, forward and backward, so that compiled code calls them as they are.

Legend: T tokens, C carried tokens, H query heads, G key and value heads, E head width, N outputs of SwiGLU.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _kernels() -> ModuleType:
    """The kernels; loading them loads triton."""
    from blt_model import pointwise_kernels

    return pointwise_kernels


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, with the numbers of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("blt_model::swiglu", mutates_args=(), schema="(Tensor gate_value) -> Tensor")
def swiglu(gate_value: Tensor) -> Tensor:
    """silu(gate) * value.

    Args:
        gate_value: [T, 2 * N] on CUDA, float16, bfloat16 or float32, gates first.

    Returns:
        [T, N].
    """
    result: Tensor = _kernels().swiglu(_rows(gate_value))
    return result


@swiglu.register_fake
def _(gate_value: Tensor) -> Tensor:
    return gate_value.new_empty(gate_value.shape[0], gate_value.shape[1] // 2)


@torch.library.custom_op(
    "blt_model::swiglu_backward", mutates_args=(), schema="(Tensor gate_value, Tensor upstream) -> Tensor"
)
def _swiglu_backward(gate_value: Tensor, upstream: Tensor) -> Tensor:
    result: Tensor = _kernels().swiglu_backward(_rows(gate_value), upstream.contiguous())
    return result


@_swiglu_backward.register_fake
def _(gate_value: Tensor, upstream: Tensor) -> Tensor:
    return gate_value.new_empty(gate_value.shape)


def _save_swiglu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_swiglu(ctx: Any, upstream: Tensor) -> Tensor:
    (gate_value,) = ctx.saved_tensors
    gradient: Tensor = _swiglu_backward(gate_value, upstream)
    return gradient


swiglu.register_autograd(_differentiate_swiglu, setup_context=_save_swiglu)


@torch.library.custom_op(
    "blt_model::split_heads",
    mutates_args=(),
    schema="(Tensor flat, Tensor cosine, Tensor sine, int num_heads, int kv_heads, Tensor? carried_key, "
    "Tensor? carried_value) -> (Tensor, Tensor, Tensor)",
)
def _split_heads(
    flat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    num_heads: int,
    kv_heads: int,
    carried_key: Tensor | None,
    carried_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    carry = None if carried_key is None or carried_value is None else (carried_key, carried_value)
    angles = cosine.contiguous(), sine.contiguous()
    result: tuple[Tensor, Tensor, Tensor] = _kernels().split_heads(_rows(flat), angles, (num_heads, kv_heads), carry)
    return result


@_split_heads.register_fake
def _(
    flat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    num_heads: int,
    kv_heads: int,
    carried_key: Tensor | None,
    carried_value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    length, width = flat.shape[0], 2 * cosine.shape[-1]
    whole = length + (0 if carried_key is None else carried_key.shape[0])
    key, value = (flat.new_empty(whole, kv_heads, width) for _ in range(2))
    return flat.new_empty(length, num_heads, width), key, value


@torch.library.custom_op(
    "blt_model::split_heads_backward",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cosine, Tensor sine) -> Tensor",
)
def _split_heads_backward(query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    parts = query.contiguous(), key.contiguous(), value.contiguous()
    result: Tensor = _kernels().join_heads(parts, (cosine.contiguous(), sine.contiguous()), len(key) - len(query))
    return result


@_split_heads_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], (query.shape[1] + 2 * key.shape[1]) * query.shape[2])


def _save_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _differentiate_split(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _split_heads_backward(*upstream, *ctx.saved_tensors), None, None, None, None, None, None


_split_heads.register_autograd(_differentiate_split, setup_context=_save_split)


def split_heads(
    flat: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: tuple[int, int],
    carry: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn queries and keys by their positions, and lay queries, keys and values each by themselves.

    Neighbouring pairs of numbers are turned, as `layers.rotate` does.

    Args:
        flat: [T, (H + 2 * G) * E] on CUDA, float16, bfloat16 or float32; E a power of two.
        cosine: float32 [T, 1, E / 2].
        sine: float32 [T, 1, E / 2].
        heads: H and G.
        carry: keys and values [C, G, E] that come before the others, without gradient; None for none.

    Returns:
        Contiguous [T, H, E] and twice [C + T, G, E].
    """
    carried_key, carried_value = (None, None) if carry is None else carry
    result: tuple[Tensor, Tensor, Tensor] = _split_heads(flat, cosine, sine, *heads, carried_key, carried_value)
    return result
