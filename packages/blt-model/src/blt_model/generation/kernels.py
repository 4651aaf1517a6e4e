"""Triton kernels for steps of one token a row: few rows, so that reading the weights is all that a step should cost.

A block of a transformer is five of them, where torch takes some twenty:

- `linear`: a linear map with what comes before (normalisation, or the joining of attention's parts) and after it
  (residual, SwiGLU). More rows than one go through torch's matrix products instead.
- `attend`: rotary embedding, the new key's and value's way into the cache, and attention over the cache, every head in
  SPLITS parts so that more of the GPU reads; the next `linear` joins them.

Sums are taken in float32 and in a fixed order. This module needs triton; import it only where `fused.available`
says so.

Legend: n rows, N outputs, K inputs, H heads, E head width, S parts of a head's attention, C places of a cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 4
"""Parts into which the attention of a head is cut, where rows are few."""
FEW_ROWS = 16
"""Above this many rows, two parts keep the GPU as busy."""
BLOCK = 128
"""Places that a part reads at once."""
DEPENDENT = True
"""Whether kernels start before those that they follow have ended, and wait for them within (compute capability 9)."""


def dependence() -> dict[str, Any]:
    """What a launch needs to start early."""
    early = DEPENDENT and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"DEPENDENT": True, "launch_pdl": True} if early else {"DEPENDENT": False}


@triton.jit
def _joined(partial, stats, row, inputs, SPLITS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Attention's output at some inputs of a row, from the parts of each head."""
    first = row * SPLITS * HEADS
    head = inputs // WIDTH
    best = tl.load(stats + (first + head) * 2)
    for split in tl.static_range(1, SPLITS):
        best = tl.maximum(best, tl.load(stats + (first + split * HEADS + head) * 2))
    total = inputs * 0.0
    mass = inputs * 0.0
    for split in tl.static_range(SPLITS):
        at = first + split * HEADS
        share = tl.exp(tl.load(stats + (at + head) * 2) - best)
        mass += share * tl.load(stats + (at + head) * 2 + 1)
        total += share * tl.load(partial + at * WIDTH + inputs)
    return total / mass


@triton.jit
def _linear_one(
    x,
    stats,
    weight,
    norm,
    residual,
    out,
    outputs,
    eps,
    residual_scale,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row: every program sums products for BLOCK_N outputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = n < outputs
    # Weights depend on no other kernel: the first of them are under way before the wait.
    at = n.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    first = tl.load(weight + at, mask=kept[:, None], other=0.0)
    if GATED:
        first_value = tl.load(weight + at + outputs.to(tl.int64) * K, mask=kept[:, None], other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    gates = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        if start == 0:
            tile = first
            if GATED:
                gate = first
                tile = first_value
        else:
            tile = tl.load(weight + at, mask=kept[:, None], other=0.0)
            if GATED:
                gate = tile
                tile = tl.load(weight + at + outputs.to(tl.int64) * K, mask=kept[:, None], other=0.0)
        if SPLITS > 0:  # noqa: SIM108  # triton compiles only the branch that is taken
            value = _joined(x, stats, 0, k, SPLITS, HEADS, WIDTH)
        else:
            value = tl.load(x + k).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(norm + k).to(tl.float32)
        sums += tile.to(tl.float32) * value[None, :]
        if GATED:
            gates += gate.to(tl.float32) * value[None, :]
    result = tl.sum(sums, 1)
    scale = 1.0
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        result *= scale
    if GATED:
        gate_sum = tl.sum(gates, 1) * scale
        result *= gate_sum / (1.0 + tl.exp(-gate_sum))
    if RESIDUAL:
        result += residual_scale * tl.load(residual + n, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=kept)


def inner_block(inputs: int) -> int:
    """The largest power of two, at most 1,024, that divides the inputs of a map."""
    return min(1024, inputs & -inputs)


def _linear_rows(x: Tensor, weight: Tensor, gated: bool, residual: Tensor | None, residual_scale: float) -> Tensor:
    """What `linear` does after the normalisation, by torch's matrix products."""
    if residual is not None and not gated:
        return torch.addmm(residual.to(x.dtype), x, weight.T, beta=residual_scale)
    result = F.linear(x, weight)
    if gated:
        result = swiglu(result)
    return result if residual is None else torch.add(result, residual, alpha=residual_scale)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    stats: Tensor | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear map of few rows: a kernel of its own for one row, torch's matrix products for more.

    Args:
        x: [n, K] contiguous; or, where there are stats, attention's parts, float32 [n, S, H, E].
        weight: [N, K] contiguous; [2 * N, K], gates first, where it is gated.
        norm: [K] scales of a root mean square normalisation that comes before; None for none.
        eps: of the normalisation.
        stats: float32 [n, S, H, 2] what `attend` gives.
        gated: give silu(gate) * value.
        residual: [n, N] to add to the result; None for none.
        residual_scale: times which it is added.
        dtype: of the result; None for the weight's.

    Returns:
        [n, N].
    """
    if len(x) > 1:
        if stats is not None:
            x = join(x, stats, weight.dtype)
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, eps)
        kind = dtype or weight.dtype
        return _linear_rows(x.to(kind), weight.to(kind), gated, residual, residual_scale)
    outputs, inputs = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    out = x.new_empty((1, outputs), dtype=dtype or weight.dtype)
    splits, heads, width = (0, 1, 1) if stats is None else (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    block = 4 if gated or outputs <= 1024 else 8
    # Pointers that are not read still have to be some.
    _linear_one[(triton.cdiv(outputs, block),)](
        x,
        x if stats is None else stats,
        weight,
        weight if norm is None else norm,
        x if residual is None else residual,
        out,
        outputs,
        eps,
        residual_scale,
        K=inputs,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        SPLITS=splits,
        HEADS=heads,
        WIDTH=width,
        BLOCK_N=block,
        BLOCK_K=inner_block(inputs),
        **dependence(),
        num_warps=4,
    )
    return out


@triton.jit
def _swiglu(gate_value, out, hidden, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """A part of one row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    gate = tl.load(gate_value + n * 2 * hidden + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate_value + (n * 2 + 1) * hidden + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * hidden + column, (value * gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty), mask=inside)


def swiglu(gate_value: Tensor) -> Tensor:
    """silu(gate) * value [n, hidden] of [n, 2 * hidden], gates first."""
    rows, hidden = len(gate_value), gate_value.shape[1] // 2
    out = gate_value.new_empty((rows, hidden))
    grid = (rows, triton.cdiv(hidden, 1024))
    _swiglu[grid](gate_value, out, hidden, BLOCK=1024, **dependence(), num_warps=4)
    return out


@triton.jit
def _join(
    partial,
    stats,
    out,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    result = _joined(partial, stats, n, k, SPLITS, HEADS, WIDTH)
    tl.store(out + n * HEADS * WIDTH + k, result.to(out.dtype.element_ty))


def join(partial: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention's output [n, H * E] from what `attend` gives."""
    rows, splits, heads, width = partial.shape
    out = partial.new_empty((rows, heads * width), dtype=dtype)
    block = inner_block(heads * width)
    _join[(rows, heads * width // block)](
        partial, stats, out, SPLITS=splits, HEADS=heads, WIDTH=width, BLOCK=block, **dependence(), num_warps=4
    )
    return out


@triton.jit
def _turned(base, e, cosine, sine):
    """A rotated head of [E], rounded as it is stored: neighbouring pairs turn by the position's angles."""
    here = tl.load(base + e).to(tl.float32)
    other = tl.load(base + (e ^ 1)).to(tl.float32)
    turned = here * cosine + tl.where(e % 2 == 0, -other, other) * sine
    return turned.to(base.dtype.element_ty)


@triton.jit
def _attend(
    query_key_value,
    keys,
    values,
    table,
    positions,
    rows,
    partial,
    stats,
    capacity,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One part of one head of one row."""
    n, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = n
    if HAS_ROWS:
        row = tl.load(rows + n).to(tl.int32)
    position = tl.load(positions + n).to(tl.int32)
    slot = position % capacity
    held = tl.minimum(position + 1, capacity)
    length = tl.cdiv(tl.cdiv(held, SPLITS), BLOCK) * BLOCK
    begin = split * length
    end = tl.minimum(begin + length, held)
    e = tl.arange(0, WIDTH)
    start = (row.to(tl.int64) * HEADS + head) * capacity * WIDTH
    places = begin + tl.arange(0, BLOCK)
    at = start + places[:, None] * WIDTH + e[None, :]
    # The first block is under way while the query is made.
    key_tile = tl.load(keys + at, mask=(places < end)[:, None], other=0.0)
    value_tile = tl.load(values + at, mask=(places < end)[:, None], other=0.0)
    cosine = tl.load(table + position * WIDTH + (e // 2) * 2)
    sine = tl.load(table + position * WIDTH + (e // 2) * 2 + 1)
    base = query_key_value + (n * 3 * HEADS + head) * WIDTH
    query = _turned(base, e, cosine, sine).to(tl.float32) * scale
    key = _turned(base + HEADS * WIDTH, e, cosine, sine)
    value = tl.load(base + 2 * HEADS * WIDTH + e)
    best = -float("inf")
    mass = 0.0
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        places = first + tl.arange(0, BLOCK)
        is_new = (places == slot)[:, None]
        tile = tl.where(is_new, key[None, :], key_tile).to(tl.float32)
        scores = tl.sum(tile * query[None, :], 1)
        scores = tl.where(places < end, scores, -float("inf"))
        largest = tl.maximum(best, tl.max(scores, 0))
        weights = tl.exp(scores - largest)
        shrink = tl.exp(best - largest)
        tile = tl.where(is_new, value[None, :], value_tile).to(tl.float32)
        total = total * shrink + tl.sum(tile * weights[:, None], 0)
        mass = mass * shrink + tl.sum(weights, 0)
        best = largest
        at += BLOCK * WIDTH
        following = (places + BLOCK < end)[:, None]
        key_tile = tl.load(keys + at, mask=following, other=0.0)
        value_tile = tl.load(values + at, mask=following, other=0.0)
    if (slot >= begin) & (slot < end):
        tl.store(keys + start + slot * WIDTH + e, key)
        tl.store(values + start + slot * WIDTH + e, value)
    part = (n * SPLITS + split) * HEADS + head
    tl.store(partial + part * WIDTH + e, total)
    tl.store(stats + part * 2, best)
    tl.store(stats + part * 2 + 1, mass)


def attend(
    query_key_value: Tensor, keys: Tensor, values: Tensor, table: Tensor, positions: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Store one token of each row and let it attend to itself and what its row holds.

    Args:
        query_key_value: [n, 3 * H * E] as the layer's map gives them.
        keys: [B, H, C, E] of the layer, contiguous.
        values: [B, H, C, E].
        table: complex64 [positions, 1, E / 2] rotary phases.
        positions: int64 [n] of the tokens; a position lies at its place modulo C.
        rows: int64 [n]; None for the first n.

    Returns:
        Parts of the heads' outputs, float32 [n, S, H, E], and their statistics, float32 [n, S, H, 2], for `linear`.
    """
    count, (_, heads, capacity, width) = len(positions), keys.shape
    splits = SPLITS if count <= FEW_ROWS else 2
    partial = torch.empty((count, splits, heads, width), dtype=torch.float32, device=keys.device)
    stats = torch.empty((count, splits, heads, 2), dtype=torch.float32, device=keys.device)
    _attend[(count, heads, splits)](
        query_key_value,
        keys,
        values,
        torch.view_as_real(table),
        positions,
        positions if rows is None else rows,
        partial,
        stats,
        capacity,
        width**-0.5,
        HEADS=heads,
        WIDTH=width,
        SPLITS=splits,
        BLOCK=BLOCK,
        HAS_ROWS=rows is not None,
        **dependence(),
        num_warps=8,
    )
    return partial, stats


@triton.jit
def _read_patches(
    query,
    keys,
    values,
    out,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTORS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of one row reads the vectors of the row's newest patch."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * HEADS + tl.program_id(1)
    e = tl.arange(0, WIDTH)
    wide = tl.load(query + at * WIDTH + e).to(tl.float32) * scale
    best = -float("inf")
    mass = 0.0
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for vector in tl.static_range(VECTORS):
        place = (at * VECTORS + vector) * WIDTH + e
        score = tl.sum(tl.load(keys + place).to(tl.float32) * wide, 0)
        largest = tl.maximum(best, score)
        weight = tl.exp(score - largest)
        shrink = tl.exp(best - largest)
        total = total * shrink + weight * tl.load(values + place).to(tl.float32)
        mass = mass * shrink + weight
        best = largest
    tl.store(out + at * WIDTH + e, (total / mass).to(out.dtype.element_ty))


def read_patches(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one byte of each row to the vectors of one patch.

    Args:
        query: [n, H * E].
        keys: [B, H, vectors, E], contiguous; row i reads the i-th.
        values: [B, H, vectors, E].

    Returns:
        [n, H * E].
    """
    _, heads, vectors, width = keys.shape
    out = torch.empty_like(query)
    _read_patches[(len(query), heads)](
        query, keys, values, out, width**-0.5, HEADS=heads, WIDTH=width, VECTORS=vectors, **dependence(), num_warps=1
    )
    return out
