"""Triton kernels for steps of one token a row: few rows, so that reading the weights is all that a step should cost.

A block of a transformer is five of them, where torch takes some twenty: four times `linear_kernels.linear`, and here
`attend`: rotary embedding, the new key's and value's way into the cache, and attention over the cache, every head in
SPLITS parts so that more of the GPU reads; the next linear map joins them.

Sums are taken in float32 and in a fixed order. This module needs triton; import it only where `fused.available`
says so.

Legend: n rows, H heads, E head width, S parts of a head's attention, C places of a cache.
"""

from __future__ import annotations

from typing import Any

import torch
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

KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's names of the dtypes of weights."""


def dependence() -> dict[str, Any]:
    """What a launch needs to start early."""
    early = DEPENDENT and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"DEPENDENT": True, "launch_pdl": True} if early else {"DEPENDENT": False}


@triton.jit
def numbers(words, kind: tl.constexpr):
    """The two numbers of 16 bits that each word of 32 holds, or the one of 32 and nought, as float32.

    Weights are loaded as words where they have to be under way before a wait: numbers of 16 bits are taken apart as
    soon as they are there, and the wait would come after that.
    """
    if kind == tl.float32:
        first = words.to(tl.float32, bitcast=True)
        second = first * 0.0
    elif kind == tl.bfloat16:
        first = (words << 16).to(tl.float32, bitcast=True)
        second = (words & -65536).to(tl.float32, bitcast=True)
    else:
        first = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


def inner_block(inputs: int) -> int:
    """The largest power of two, at most 1,024, that divides the inputs of a map."""
    return min(1024, inputs & -inputs)


@triton.jit
def _turned(base, e, cosine, sine):
    """A rotated head of [E], rounded as it is stored: neighbouring pairs turn by the position's angles."""
    here = tl.load(base + e).to(tl.float32)
    other = tl.load(base + (e ^ 1)).to(tl.float32)
    turned = here * cosine + tl.where(e % 2 == 0, -other, other) * sine
    return turned.to(base.dtype.element_ty)


@triton.jit
def _attend(
    query_key_value, keys, values, table, positions, rows, partial, stats, capacity, scale, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
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
