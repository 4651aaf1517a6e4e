"""Triton kernels for the decoder's cross-attention folded with the patch that is read.

A patch stays the newest for several bytes, and its K keys and values with it. So a layer's query map and output map
are folded with them once a patch: into one vector for every head and key, of which the scores are the products with
the byte's state, and one for every head and value, of which the result is the sum weighted by attention. A byte then
reads 4 * H * K * dim bytes of its own row instead of the two maps.

- `fold`: makes both from a patch's keys and values, for all layers at once, from the weights where they lie.
- `read_folded`: normalisation, scores, softmax, output and residual of one layer in one kernel.

Sums are taken in float32 and in a fixed order. As `kernels`, this module needs triton.

Legend: n rows, m rows that complete a patch, B rows of the buffers, L layers, H heads, E head width, K vectors of a
patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_model.generation.kernels import KINDS, dependence, inner_block, numbers


@triton.jit
def _fold_queries(
    key_value,
    rows,
    norms,
    norm_offsets,
    queries,
    query_offsets,
    score_map,
    count,
    room,
    scale,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Some inputs of the scores of one head of one layer, for every row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    head, layer = tl.program_id(1), tl.program_id(2)
    e = tl.arange(0, WIDTH)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Weights depend on no other kernel: they are under way before the wait.
    start = tl.multiple_of(tl.load(query_offsets + layer), ALIGNED)
    tile = tl.load(queries + start + (head * WIDTH + e)[:, None] * DIM + d[None, :])
    norm = tl.load(norms + tl.multiple_of(tl.load(norm_offsets + layer), ALIGNED) + d).to(tl.float32) * scale
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    for index in range(count):
        row = tl.load(rows + index)
        for vector in tl.static_range(VECTORS):
            here = ((layer * count + index) * VECTORS + vector) * 2 * DIM + head * WIDTH + e
            key = tl.load(key_value + here).to(tl.float32)
            folded = tl.sum(tile.to(tl.float32) * key[:, None], 0) * norm
            there = (((layer * room + row) * HEADS + head) * VECTORS + vector) * DIM + d
            tl.store(score_map + there, folded.to(score_map.dtype.element_ty))


@triton.jit
def _fold_outputs(
    key_value,
    rows,
    outputs,
    output_offsets,
    output_map,
    count,
    room,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_ROOM: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Some outputs of one layer, of every head and for every row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    layer = tl.program_id(1)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEAD_ROOM)
    inside = head < HEADS
    inner = head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = tl.multiple_of(tl.load(output_offsets + layer), ALIGNED)
    at = start + d[:, None, None] * DIM + inner[None, :, :]
    tile = tl.load(outputs + at, mask=inside[None, :, None], other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    for index in range(count):
        row = tl.load(rows + index)
        for vector in tl.static_range(VECTORS):
            here = ((layer * count + index) * VECTORS + vector) * 2 * DIM + DIM + inner
            value = tl.load(key_value + here, mask=inside[:, None], other=0.0).to(tl.float32)
            folded = tl.sum(tile.to(tl.float32) * value[None, :, :], 2)
            there = ((layer * room + row) * DIM + d[:, None]) * HEADS * VECTORS + (head * VECTORS + vector)[None, :]
            tl.store(output_map + there, folded.to(output_map.dtype.element_ty), mask=inside[None, :])


@dataclass(frozen=True, slots=True)
class Scattered:
    """Tensors of equal shape, one a layer, wherever they lie: the first, and how far from it the others are."""

    first: Tensor
    offsets: Tensor
    """int64 [L] in elements."""
    aligned: int
    """A power of two, at most 16, that divides all offsets."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Scattered:
        """Note where tensors lie; they must stay there, be contiguous, and of one dtype.

        Raises:
            ValueError: for tensors that are none of that.
        """
        first = tensors[0]
        size = first.element_size()
        distances = [tensor.data_ptr() - first.data_ptr() for tensor in tensors]
        alike = all(tensor.is_contiguous() and tensor.dtype == first.dtype for tensor in tensors)
        if not alike or any(distance % size for distance in distances):
            raise ValueError("the layers' weights must be contiguous, of one dtype and whole elements apart")
        offsets = [distance // size for distance in distances]
        return cls(first, torch.tensor(offsets, device=first.device), math.gcd(16, *offsets))


def fold(
    key_value: Tensor,
    rows: Tensor,
    norms: Scattered,
    queries: Scattered,
    outputs: Scattered,
    score_map: Tensor,
    output_map: Tensor,
    heads: int,
) -> None:
    """Fold the maps of all layers with the keys and values of some rows' new patches.

    Args:
        key_value: [L, m * K, 2 * dim], contiguous, keys before values, heads side by side.
        rows: int64 [m] which rows they are of.
        norms: [dim] scales of the normalisation before the queries.
        queries: [dim, dim] maps of the queries.
        outputs: [dim, dim] maps after attention.
        score_map: [L, B, H * K, dim] to write to: what a normalised state without scales is multiplied with for the
            score of head h and vector k, at h * K + k.
        output_map: [L, B, dim, H * K] to write to: what the output is for each head's whole attention to one vector.
        heads: H.
    """
    layers, room, pairs, dim = score_map.shape
    width, block = dim // heads, min(128, inner_block(dim))
    sizes = {"DIM": dim, "HEADS": heads, "WIDTH": width, "VECTORS": pairs // heads, **dependence()}
    _fold_queries[(dim // block, heads, layers)](
        key_value,
        rows,
        norms.first,
        norms.offsets,
        queries.first,
        queries.offsets,
        score_map,
        len(rows),
        room,
        width**-0.5,
        ALIGNED=math.gcd(norms.aligned, queries.aligned),
        BLOCK=block,
        **sizes,
        num_warps=4,
    )
    _fold_outputs[(dim // 8, layers)](
        key_value,
        rows,
        outputs.first,
        outputs.offsets,
        output_map,
        len(rows),
        room,
        HEAD_ROOM=triton.next_power_of_2(heads),
        ALIGNED=outputs.aligned,
        BLOCK=8,
        **sizes,
        num_warps=4,
    )


@triton.jit
def _attention(scores, vector, HEAD_ROOM: tl.constexpr, VECTORS: tl.constexpr, VECTOR_ROOM: tl.constexpr):
    """The softmax of scores [HEAD_ROOM * VECTOR_ROOM] over each head's vectors."""
    if VECTORS != VECTOR_ROOM:
        scores = tl.where(vector < VECTORS, scores, -float("inf"))
    grouped = tl.reshape(scores, [HEAD_ROOM, VECTOR_ROOM])
    weights = tl.exp(grouped - tl.max(grouped, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    return tl.reshape(weights, [HEAD_ROOM * VECTOR_ROOM])


@triton.jit
def _read_folded(
    x,
    x_words,
    score_words,
    output_map,
    out,
    residual,
    eps,
    kind: tl.constexpr,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_ROOM: tl.constexpr,
    VECTORS: tl.constexpr,
    VECTOR_ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK outputs of one row; every program makes all of the row's scores."""
    # The kernel after this one has loads of its own to begin with.
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(1)
    pairs: tl.constexpr = HEADS * VECTORS
    slot = tl.arange(0, HEAD_ROOM * VECTOR_ROOM)
    head, vector = slot // VECTOR_ROOM, slot % VECTOR_ROOM
    inside = (head < HEADS) & (vector < VECTORS)
    pair = slot
    if VECTORS != VECTOR_ROOM:
        pair = head * VECTORS + vector
    chunk, column = tl.arange(0, AHEAD), tl.arange(0, CHUNK)
    inner = chunk[:, None] * CHUNK + column[None, :]
    # What a patch left was written before this step began: it is under way before the wait. With the
    # chunks first, a slot's sum stays within a warp.
    base = score_words + (n * pairs + pair) * WORDS
    tile = tl.load(base[None, :, None] + inner[:, None, :], mask=inside[None, :, None], other=0)
    outputs = n * DIM + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out_tile = tl.load(output_map + outputs[:, None] * pairs + pair[None, :], mask=inside[None, :], other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    old = tl.load(x + outputs).to(tl.float32)
    words = tl.load(x_words + n * WORDS + inner)
    state, next_state = numbers(words, kind)
    square = tl.sum(state * state + next_state * next_state)
    state, next_state = numbers(words[:, None, :], kind)
    score, next_score = numbers(tile, kind)
    scores = tl.sum(tl.sum(score * state + next_score * next_state, 0), 1)
    for start in tl.static_range(AHEAD * CHUNK, WORDS, CHUNK):
        state, next_state = numbers(tl.load(x_words + n * WORDS + start + column), kind)
        square += tl.sum(state * state + next_state * next_state)
        tile = tl.load(base[:, None] + (start + column)[None, :], mask=inside[:, None], other=0)
        score, next_score = numbers(tile, kind)
        scores += tl.sum(score * state[None, :] + next_score * next_state[None, :], 1)
    scores *= 1.0 / tl.sqrt(square / DIM + eps)
    weights = _attention(scores, vector, HEAD_ROOM, VECTORS, VECTOR_ROOM)
    result = tl.sum(out_tile.to(tl.float32) * weights[None, :], 1)
    tl.store(out + outputs, (residual * old + result).to(out.dtype.element_ty))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingShape:
    """How `read_folded` cuts its work."""

    block: int
    """Outputs of a program."""
    chunk: int
    """Words of 32 bits that lie side by side in a warp."""
    ahead: int
    """Chunks of all scores' vectors that are loaded before the wait."""
    warps: int


def reading_shape(dim: int, words: int, slots: int) -> ReadingShape:
    """The launch shape for a width, its words, and the scores of a row, with room to powers of two.

    What is loaded before the wait takes at most 64 registers of a thread, so that it fits beside the kernel before.
    """
    chunk = min(128, inner_block(words))
    warps = 8 if slots * words <= 16_384 else 16
    most = max(1, min(words, warps * 2048 // slots) // chunk)
    return ReadingShape(block=min(64, inner_block(dim)), chunk=chunk, ahead=1 << (most.bit_length() - 1), warps=warps)


def read_folded(
    x: Tensor,
    score_map: Tensor,
    output_map: Tensor,
    heads: int,
    *,
    residual: float,
    eps: float,
    shape: ReadingShape | None = None,
) -> Tensor:
    """Let a byte of each row read its row's newest patch, in one layer.

    What `fold` wrote must have been complete before the graph began in which this runs: it is read before the kernels
    that come before this one have ended.

    Args:
        x: [n, dim] contiguous, of the maps' dtype; n <= B, and row i reads the i-th of the maps.
        score_map: [B, H * K, dim] of the layer, contiguous.
        output_map: [B, dim, H * K] of the layer, contiguous.
        heads: H.
        residual: times which x is added.
        eps: of the normalisation before the queries.
        shape: of the launch; None for what `reading_shape` says.

    Returns:
        [n, dim].
    """
    count, dim = x.shape
    vectors = score_map.shape[1] // heads
    head_room, vector_room = triton.next_power_of_2(heads), triton.next_power_of_2(vectors)
    words = dim * x.element_size() // 4
    if shape is None:
        shape = reading_shape(dim, words, head_room * vector_room)
    out = torch.empty_like(x)
    _read_folded[(dim // shape.block, count)](
        x,
        x.view(torch.int32),
        score_map.view(torch.int32),
        output_map,
        out,
        residual,
        eps,
        kind=KINDS[x.dtype],
        DIM=dim,
        WORDS=words,
        HEADS=heads,
        HEAD_ROOM=head_room,
        VECTORS=vectors,
        VECTOR_ROOM=vector_room,
        BLOCK=shape.block,
        CHUNK=shape.chunk,
        AHEAD=shape.ahead,
        **dependence(),
        num_warps=shape.warps,
    )
    return out
