"""Triton kernels for what a block does between its products: turning heads by their positions, and SwiGLU.

Compilers fuse these as well, but where a result is put together from parts they compute every part for all of it; here
each number is read once and written once. Arithmetic is float32. This module needs triton; import it only where
`triton_support` says so.

Legend: T tokens, H query heads, G key and value heads, E head width, N outputs of SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32
"""Tokens of a program that turns heads."""
_HEADS = 8
"""Heads of such a program, for all of which it reads the angles once."""
_NUMBERS = 1024
"""Outputs of SwiGLU that a program makes."""
_ROW_NUMBERS = 4096
"""Numbers that a program normalises, of as many rows as they are."""


@triton.jit
def _turned(pairs, cosine, sine, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Heads [ROWS, WIDTH], neighbouring numbers rotated by angles [ROWS, WIDTH / 2]."""
    even, odd = tl.split(tl.reshape(pairs, [ROWS, WIDTH // 2, 2]))
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [ROWS, WIDTH])


@triton.jit(do_not_specialize=["count", "carried"])
def _split_heads(
    flat, cosine, sine, query, key, value, count, carried, step, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Some heads of some tokens: from `flat` to the three, or, where it goes back, from the three to `flat`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (row < count)[:, None]
    half = tl.arange(0, WIDTH // 2)[None, :]
    at = row[:, None] * (WIDTH // 2) + half
    c = tl.load(cosine + at, mask=real, other=0.0)
    s = tl.load(sine + at, mask=real, other=0.0)
    if BACK:
        s = -s
    column = tl.arange(0, WIDTH)[None, :]
    wide = row.to(tl.int64)[:, None]
    kept = wide + carried
    for index in range(EACH):
        head = tl.program_id(1) * EACH + index
        if head < HEADS + 2 * KV_HEADS:
            joined = flat + wide * step + head * WIDTH + column
            if head < HEADS:
                apart = query + wide * (HEADS * WIDTH) + head * WIDTH + column
            elif head < HEADS + KV_HEADS:
                apart = key + kept * (KV_HEADS * WIDTH) + (head - HEADS) * WIDTH + column
            else:
                apart = value + kept * (KV_HEADS * WIDTH) + (head - HEADS - KV_HEADS) * WIDTH + column
            numbers = tl.load(apart if BACK else joined, mask=real, other=0.0)
            if head < HEADS + KV_HEADS:
                numbers = _turned(numbers.to(tl.float32), c, s, ROWS, WIDTH).to(flat.dtype.element_ty)
            tl.store(joined if BACK else apart, numbers, mask=real)


def _launch_split(
    flat: Tensor, angles: tuple[Tensor, Tensor], parts: tuple[Tensor, Tensor, Tensor], carried: int, back: bool
) -> None:
    (_, num_heads, width), kv_heads = parts[0].shape, parts[1].shape[1]
    grid = (triton.cdiv(len(flat), _ROWS), triton.cdiv(num_heads + 2 * kv_heads, _HEADS))
    if len(flat):
        _split_heads[grid](
            flat, *angles, *parts, len(flat), carried, flat.stride(0), HEADS=num_heads, KV_HEADS=kv_heads, WIDTH=width,
            ROWS=_ROWS, EACH=_HEADS, BACK=back, num_warps=4,
        )  # fmt: skip


def split_heads(
    flat: Tensor,
    angles: tuple[Tensor, Tensor],
    heads: tuple[int, int],
    carry: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn queries and keys by their positions, and lay queries, keys and values each by themselves.

    Args:
        flat: [T, (H + 2 * G) * E], rows contiguous.
        angles: cosines and sines, contiguous float32 [T, 1, E / 2].
        heads: H and G.
        carry: keys and values [C, G, E] that come before the others; None for none.

    Returns:
        Contiguous [T, H, E] and twice [C + T, G, E].
    """
    num_heads, kv_heads = heads
    length, carried = len(flat), 0 if carry is None else len(carry[0])
    width = flat.shape[1] // (num_heads + 2 * kv_heads)
    query = flat.new_empty(length, num_heads, width)
    key, value = (flat.new_empty(carried + length, kv_heads, width) for _ in range(2))
    if carry is not None:
        key[:carried], value[:carried] = carry
    _launch_split(flat, angles, (query, key, value), carried, back=False)
    return query, key, value


def join_heads(parts: tuple[Tensor, Tensor, Tensor], angles: tuple[Tensor, Tensor], carried: int) -> Tensor:
    """The gradient of `split_heads`' first argument, [T, (H + 2 * G) * E], from those of its contiguous results."""
    length, num_heads, width = parts[0].shape
    flat = parts[0].new_empty(length, (num_heads + 2 * parts[1].shape[1]) * width)
    _launch_split(flat, angles, parts, carried, back=True)
    return flat


@triton.jit(do_not_specialize=["count"])
def _turn_in_place(
    flat, cosine, sine, count, step, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr
):
    """Some of the first heads of some tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (row < count)[:, None]
    at = row[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
    c = tl.load(cosine + at, mask=real, other=0.0)
    s = tl.load(sine + at, mask=real, other=0.0)
    first = flat + row.to(tl.int64)[:, None] * step + tl.arange(0, WIDTH)[None, :]
    for index in range(EACH):
        head = tl.program_id(1) * EACH + index
        if head < HEADS:
            numbers = tl.load(first + head * WIDTH, mask=real, other=0.0).to(tl.float32)
            turned = _turned(numbers, c, s, ROWS, WIDTH)
            tl.store(first + head * WIDTH, turned.to(flat.dtype.element_ty), mask=real)


def turn_in_place(flat: Tensor, angles: tuple[Tensor, Tensor], heads: int, width: int) -> None:
    """Turn the first heads of each row by the row's angles, neighbouring pairs of numbers as `layers.rotate` does.

    Args:
        flat: [T, at least heads * width], rows contiguous, written.
        angles: cosines and sines, contiguous float32 [T, 1, width / 2].
        heads: how many.
        width: E, a power of two.
    """
    if len(flat):
        grid = (triton.cdiv(len(flat), _ROWS), triton.cdiv(heads, _HEADS))
        _turn_in_place[grid](
            flat, *angles, len(flat), flat.stride(0), HEADS=heads, WIDTH=width, ROWS=_ROWS, EACH=_HEADS, num_warps=4
        )


@triton.jit(do_not_specialize=["count"])
def _normalize(
    x, out, count, step, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SCALES_ONLY: tl.constexpr
):
    """Rows divided by their root mean square, or only what they would be multiplied by."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    real = (row < count)[:, None] & (column < DIM)
    numbers = tl.load(x + row[:, None] * step + column, mask=real, other=0.0).to(tl.float32)
    scales = tl.rsqrt(tl.sum(numbers * numbers, 1) / DIM + eps)
    if SCALES_ONLY:
        tl.store(out + row, scales, mask=row < count)
    else:
        tl.store(out + row[:, None] * DIM + column, (numbers * scales[:, None]).to(out.dtype.element_ty), mask=real)


def _launch_normalize(x: Tensor, out: Tensor, eps: float, scales_only: bool) -> Tensor:
    count, dim = x.shape
    block = triton.next_power_of_2(dim)
    rows = max(1, _ROW_NUMBERS // block)
    if count:
        _normalize[(triton.cdiv(count, rows),)](
            x, out, count, x.stride(0), eps, DIM=dim, BLOCK=block, ROWS=rows, SCALES_ONLY=scales_only, num_warps=4
        )
    return out


def normalize(x: Tensor, eps: float) -> Tensor:
    """Rows divided by their root mean square.

    Args:
        x: [T, dim], rows contiguous.
        eps: added to the mean square.

    Returns:
        [T, dim] of x's dtype, contiguous.
    """
    return _launch_normalize(x, x.new_empty(x.shape), eps, scales_only=False)


def row_scales(x: Tensor, eps: float) -> Tensor:
    """What `normalize` multiplies each row by: float32 [T]; arguments as there."""
    return _launch_normalize(x, x.new_empty(len(x), dtype=torch.float32), eps, scales_only=True)


@triton.jit
def _swiglu(gate_value, scales, out, step, N: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """silu(gate) * value of one row; in a chain of kernels that start early, once the one before has ended."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_value + row * step + at, mask=at < N, other=0.0).to(tl.float32)
    value = tl.load(gate_value + row * step + N + at, mask=at < N, other=0.0).to(tl.float32)
    if scales is not None:
        scale = tl.load(scales + row)
        gate *= scale
        value *= scale
    result = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(out + row * N + at, result.to(out.dtype.element_ty), mask=at < N)


@triton.jit
def _swiglu_backward(gate_value, upstream, out, step, N: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of one row's gates and values."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_value + row * step + at, mask=at < N, other=0.0).to(tl.float32)
    value = tl.load(gate_value + row * step + N + at, mask=at < N, other=0.0).to(tl.float32)
    above = tl.load(upstream + row * N + at, mask=at < N, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    slope = share * (1.0 + gate * (1.0 - share))
    tl.store(out + row * 2 * N + at, (above * value * slope).to(out.dtype.element_ty), mask=at < N)
    tl.store(out + row * 2 * N + N + at, (above * gate * share).to(out.dtype.element_ty), mask=at < N)


def swiglu(gate_value: Tensor, *, scales: Tensor | None = None, dependence: Mapping[str, Any] | None = None) -> Tensor:
    """silu(gate) * value, [T, N].

    Args:
        gate_value: [T, 2 * N], rows contiguous, gates first.
        scales: float32 [T], by which gates and values of each row are multiplied before; None for 1.
        dependence: launch options of a kernel that starts before the one that it follows has ended; None for none.
    """
    count = gate_value.shape[1] // 2
    out = gate_value.new_empty(len(gate_value), count)
    if out.numel():
        grid = (len(out), triton.cdiv(count, _NUMBERS))
        options = {"DEPENDENT": False} if dependence is None else dependence
        _swiglu[grid](gate_value, scales, out, gate_value.stride(0), N=count, BLOCK=_NUMBERS, **options, num_warps=4)
    return out


def swiglu_backward(gate_value: Tensor, upstream: Tensor) -> Tensor:
    """The gradient [T, 2 * N] of `swiglu`'s argument, from contiguous [T, N]."""
    out = torch.empty(gate_value.shape, dtype=gate_value.dtype, device=gate_value.device)
    count = upstream.shape[1]
    if out.numel():
        grid = (len(out), triton.cdiv(count, _NUMBERS))
        _swiglu_backward[grid](gate_value, upstream, out, gate_value.stride(0), N=count, BLOCK=_NUMBERS, num_warps=4)
    return out
