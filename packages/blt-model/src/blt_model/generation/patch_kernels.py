"""Triton kernels for what completes a patch of one text: pooling its bytes, and its vectors' reading of them.

As in `kernels`, sums are taken in float32 and in a fixed order, and the module needs triton.

Legend: S room for the bytes of a patch, K vectors of a patch, H heads, E head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_model.generation.kernels import dependence


@triton.jit
def _pool(states, lengths, out, dim, MEAN: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """Some columns of all bytes."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(lengths).to(tl.int32)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = column < dim
    total = tl.full([BLOCK], 0.0 if MEAN else -float("inf"), dtype=tl.float32)
    for place in range(length):
        row = tl.load(states + place * dim + column, mask=kept, other=0.0).to(tl.float32)
        total = total + row if MEAN else tl.maximum(total, row)
    if MEAN:
        total = total / length
    tl.store(out + column, total.to(out.dtype.element_ty), mask=kept)


def pool(states: Tensor, lengths: Tensor, *, mean: bool) -> Tensor:
    """Pool the bytes of one open patch.

    Args:
        states: [S, dim] contiguous.
        lengths: int64 [1] how many of them there are, at least 1.
        mean: their mean, not their maximum.

    Returns:
        [1, dim].
    """
    dim = states.shape[1]
    out = states.new_empty((1, dim))
    block = 64
    _pool[(triton.cdiv(dim, block),)](states, lengths, out, dim, MEAN=mean, BLOCK=block, **dependence(), num_warps=2)
    return out


@triton.jit
def _read_bytes(
    query, heads, lengths, out, scale, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROOM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One head of one vector reads the patch's bytes, all at once."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(lengths).to(tl.int32)
    vector, head = tl.program_id(0), tl.program_id(1)
    e, place = tl.arange(0, WIDTH), tl.arange(0, ROOM)
    inside = place < length
    at = (vector * HEADS + head) * WIDTH + e
    wide = tl.load(query + at).to(tl.float32) * scale
    key_at = (place * 2 * HEADS + head)[:, None] * WIDTH + e[None, :]
    keys = tl.load(heads + key_at, mask=inside[:, None], other=0.0).to(tl.float32)
    scores = tl.where(inside, tl.sum(keys * wide[None, :], 1), -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    values = tl.load(heads + key_at + HEADS * WIDTH, mask=inside[:, None], other=0.0).to(tl.float32)
    total = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + at, total.to(out.dtype.element_ty))


def read_bytes(query: Tensor, heads: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Attention of the vectors of one patch to its bytes.

    Args:
        query: [K, H * E] contiguous.
        heads: [S, 2 * H * E] contiguous, keys before values.
        lengths: int64 [1] how many bytes there are, at least 1.
        width: E, a power of two.

    Returns:
        [K, H * E].
    """
    count, dim = query.shape
    out = torch.empty_like(query)
    _read_bytes[(count, dim // width)](
        query,
        heads,
        lengths,
        out,
        width**-0.5,
        HEADS=dim // width,
        WIDTH=width,
        ROOM=triton.next_power_of_2(len(heads)),
        **dependence(),
        num_warps=4,
    )
    return out
