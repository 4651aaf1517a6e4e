"""Triton kernels for what completes a patch of one text: it reads its bytes, and is made ready to be read by others.

As in `kernels`, sums are taken in float32 and in a fixed order, and the module needs triton.

Legend: S room for the bytes of a patch, K vectors of a patch, H heads, E head width, L decoder layers with
cross-attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_model.generation.absorbed import AbsorbedPatch
from blt_model.generation.kernels import KINDS, dependence, numbers
from blt_model.generation.linear_kernels import added, chunk_of, linear_shape

_AT_ONCE = 8
"""Bytes that are read at once where a patch is pooled, as many as most patches have."""


@triton.jit
def _pooled(
    states, length, kind: tl.constexpr, WORDS: tl.constexpr, MEAN: tl.constexpr, CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """The maximum or mean of the first bytes, rounded as they are, as `numbers` gives those of words, [1, CHUNK] each.

    There are so many words, and nought beyond them; PLACES bytes are under way at once.
    """
    word = tl.arange(0, CHUNK)[None, :]
    nought = tl.zeros([1, CHUNK], dtype=tl.int32)
    low = tl.full([1, CHUNK], 0.0 if MEAN else -float("inf"), dtype=tl.float32)
    high = low
    for first in range(0, length, PLACES):
        rows = tl.tuple(())
        for place in tl.static_range(PLACES):
            at = nought + first + place
            mask = (at < length) & (word < WORDS)
            rows = rows + (tl.load(states + at * WORDS + word, mask=mask, other=0),)  # noqa: RUF005
        for place in tl.static_range(PLACES):
            one, other = numbers(rows[place], kind)
            if MEAN:
                low += one
                high += other
            else:
                inside = nought + first + place < length
                low = tl.where(inside, tl.maximum(low, one), low)
                high = tl.where(inside, tl.maximum(high, other), high)
    if MEAN:
        low, high = low / length, high / length
    return low.to(kind).to(tl.float32), high.to(kind).to(tl.float32)


@triton.jit
def _map_pooled(
    states, lengths, weight, out, outputs, kind: tl.constexpr, WORDS: tl.constexpr, MEAN: tl.constexpr,
    EACH: tl.constexpr, CHUNK: tl.constexpr, PLACES: tl.constexpr, EXACT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some outputs; every program pools for itself while its weights are under way."""
    start = tl.program_id(0) * EACH
    row = tl.arange(0, EACH)[:, None]
    kept = start + row < outputs
    # Weights depend on no other kernel.
    tile = chunk_of(weight + start.to(tl.int64) * WORDS, row, kept, 0, WORDS, CHUNK, EXACT)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    low, high = _pooled(states, tl.load(lengths).to(tl.int32), kind, WORDS, MEAN, CHUNK, PLACES)
    sums = added(tl.zeros([EACH, 1, CHUNK], dtype=tl.float32), tile, low, high, kind)
    tl.store(out + start + row, tl.sum(sums, 2).to(out.dtype.element_ty), mask=kept)


def map_pooled(states: Tensor, lengths: Tensor, weight: Tensor, *, mean: bool) -> Tensor:
    """Pool the bytes of one open patch and map what that gives.

    Args:
        states: [S, dim] contiguous, of the weight's dtype.
        lengths: int64 [1] how many of them there are, at least 1.
        weight: [N, dim] contiguous.
        mean: their mean, not their maximum; either is rounded to the weight's dtype before it is mapped.

    Returns:
        [1, N].
    """
    outputs, words = len(weight), weight.shape[1] * weight.element_size() // 4
    # All words in one chunk, so that a program pools but once, as one joins attention's parts but once.
    shape = linear_shape(outputs, words, gated=False, joined=True)
    out = states.new_empty((1, outputs))
    _map_pooled[(triton.cdiv(outputs, shape.rows),)](
        states.view(torch.int32),
        lengths,
        weight.view(torch.int32),
        out,
        outputs,
        kind=KINDS[weight.dtype],
        WORDS=words,
        MEAN=mean,
        EACH=shape.rows,
        CHUNK=shape.chunk,
        PLACES=_AT_ONCE,
        EXACT=outputs % shape.rows == 0 and words == shape.chunk,
        **dependence(),
        num_warps=shape.warps,
    )
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


@triton.jit
def _absorb(
    heads, weights, to_keys, to_values, dim, scale, LAYERS: tl.constexpr, HEADS: tl.constexpr,
    VECTORS: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, kind: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Keys or values of one head in one layer, for some columns."""
    held: tl.constexpr = 1 if kind == tl.float32 else 2
    layer, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    which = tl.program_id(2)
    e, word = tl.arange(0, WIDTH), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = dim // held
    inside = word < words
    first = ((which * LAYERS + layer) * HEADS + head).to(tl.int64) * WIDTH * words
    # Weights depend on no other kernel.
    tile = tl.load(weights + first + e[:, None] * words + word[None, :], mask=inside[None, :], other=0)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    low, high = numbers(tile, kind)
    for vector in tl.static_range(VECTORS):
        score = head * VECTORS + vector
        row = tl.load(heads + (((vector * LAYERS + layer) * 2 + which) * HEADS + head) * WIDTH + e)
        row = row.to(tl.float32)[:, None]
        low_sum, high_sum = tl.sum(low * row, 0), tl.sum(high * row, 0)
        if which == 0:
            at = to_keys + (layer * PLACES + score) * dim + held * word
            tl.store(at, (low_sum * scale).to(kind), mask=inside)
            if held == 2:
                tl.store(at + 1, (high_sum * scale).to(kind), mask=inside)
        else:
            at = to_values + (layer * dim + held * word) * PLACES + score
            tl.store(at, low_sum.to(kind), mask=inside)
            if held == 2:
                tl.store(at + PLACES, high_sum.to(kind), mask=inside)


def absorb(heads: Tensor, weights: Tensor, patch: AbsorbedPatch) -> None:
    """Multiply the readers' weights into the keys and values of the one patch; see `absorbed`.

    Args:
        heads: [K, L, 2, H, E] contiguous, keys before values.
        weights: [2, L, H, E, dim] what `absorbed_weights` gives.
        patch: takes the result.
    """
    _, layers, count, width, dim = weights.shape
    held = 4 // weights.element_size()
    # One warp sums over a head's width by itself.
    block = 32
    _absorb[(layers * count, triton.cdiv(dim // held, block), 2)](
        heads,
        weights.view(torch.int32),
        patch.keys,
        patch.values,
        dim,
        width**-0.5,
        LAYERS=layers,
        HEADS=count,
        VECTORS=patch.vectors,
        WIDTH=width,
        PLACES=patch.keys.shape[1],
        BLOCK=block,
        kind=KINDS[weights.dtype],
        **dependence(),
        num_warps=1,
    )
