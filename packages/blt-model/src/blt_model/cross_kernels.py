"""Triton kernels for the cross-attentions between bytes and the patch that holds them, or that they read.

Both directions are segment operations, cut into work as `segment_kernels` says: a program takes a chunk of the bytes of
one patch and some of the heads, holds what belongs to the patch in registers, and passes over the bytes in tiles. So
everything is read once and written once, forward and backward, whatever a patch's length. Tensors of a patch and of
bytes are tiles of four dimensions, [bytes, vectors, heads, width], with 1 where they have none: their layouts in
registers are then the same, and nothing is moved between threads but in sums over the width.

Everything is computed in float32. Scores are in base 2.

This module needs triton; import it only for tensors on CUDA (or under Triton's interpreter).

Legend: T bytes, P patches, K vectors of a patch, H heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_model.segment_kernels import CHUNK, chunk_of, join, long_segment, new_buffer, windows

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """What a program takes at once."""

    bytes: int
    """A power of two."""
    heads: int
    """A power of two."""
    warps: int


def cut_for(vectors: int, heads: int, width: int) -> Cut:
    """What a program takes of K vectors of H heads of E numbers.

    A thread holds 8 numbers of a row of heads, 16 bytes in half precision.
    """
    wide = _power(width)
    at_once = min(_power(heads), max(1, 256 // wide))
    return Cut(bytes=max(1, 8 // _power(vectors)), heads=at_once, warps=max(1, at_once * wide // 256))


def _power(number: int) -> int:
    return int(triton.next_power_of_2(number))


@triton.jit
def _columns(block, HEADS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Places of some heads in a row of all, [1, 1, HEADS * WIDE], and which of them there are."""
    columns = tl.arange(0, HEADS * WIDE)[None, None, :]
    if WIDTH == WIDE:
        return block * (HEADS * WIDE) + columns, block * (HEADS * WIDE) + columns < COUNT * WIDTH
    heads, places = block * HEADS + columns // WIDE, columns % WIDE
    return heads * WIDTH + places, (heads < COUNT) & (places < WIDTH)


@triton.jit
def _load(base, at, inside, HEADS: tl.constexpr, WIDE: tl.constexpr):
    """[bytes, vectors, heads, width] of places [bytes, vectors, heads * width]."""
    loaded = tl.load(base + at, mask=inside, other=0.0)
    return tl.reshape(loaded, [at.shape[0], at.shape[1], HEADS, WIDE]).to(tl.float32)


@triton.jit
def _store(base, at, inside, value):
    tl.store(base + at, tl.reshape(value.to(base.dtype.element_ty), at.shape), mask=inside)


@triton.jit
def _weights(q, k, scale, is_vector):
    """Of the vectors of a patch for every byte, [bytes, vectors, heads, 1]."""
    scores = tl.where(is_vector, tl.sum(q * k, 3, keep_dims=True) * scale, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, 1, keep_dims=True))
    return weights / tl.sum(weights, 1, keep_dims=True)


@triton.jit(do_not_specialize=["num_windows"])
def _bytes_read(
    query, key_value, ids, offsets, output, num_windows, scale, VECTORS: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, MANY: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Some heads of a chunk of the bytes that read one patch."""
    blocks = tl.cdiv(COUNT, HEADS)
    patch, start, end, _, _, _ = chunk_of(tl.program_id(0) // blocks, ids, offsets, num_windows, CHUNK)
    if start < end:
        columns, inside = _columns(tl.program_id(0) % blocks, HEADS, COUNT, WIDTH, WIDE)
        vectors = tl.arange(0, MANY)[None, :, None]
        at = (patch * VECTORS + vectors) * (2 * COUNT * WIDTH) + columns
        k = _load(key_value, at, inside & (vectors < VECTORS), HEADS, WIDE)
        v = _load(key_value + COUNT * WIDTH, at, inside & (vectors < VECTORS), HEADS, WIDE)
        for first in range(start, end, BYTES):
            rows = first + tl.arange(0, BYTES)[:, None, None]
            at_rows = rows.to(tl.int64) * (COUNT * WIDTH) + columns
            real = inside & (rows < end)
            weights = _weights(_load(query, at_rows, real, HEADS, WIDE), k, scale, (vectors < VECTORS)[:, :, :, None])
            _store(output, at_rows, real, tl.sum(weights * v, 1, keep_dims=True))


@triton.jit(do_not_specialize=["num_windows"])
def _bytes_read_gradient(
    upstream, query, key_value, ids, offsets, query_gradient, gradient, buffer, num_windows, scale,
    VECTORS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, MANY: tl.constexpr, HEADS: tl.constexpr,
    WIDE: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's queries, and what the chunk gives to the patch's keys and values."""
    blocks = tl.cdiv(COUNT, HEADS)
    program = tl.program_id(0) // blocks
    patch, start, end, begin, last, row = chunk_of(program, ids, offsets, num_windows, CHUNK)
    if (program >= num_windows) | (start < end):
        columns, inside = _columns(tl.program_id(0) % blocks, HEADS, COUNT, WIDTH, WIDE)
        vectors = tl.arange(0, MANY)[None, :, None]
        is_vector = vectors < VECTORS
        inside_vectors = inside & is_vector
        at = (patch * VECTORS + vectors) * (2 * COUNT * WIDTH) + columns
        k = _load(key_value, at, inside_vectors, HEADS, WIDE)
        v = _load(key_value + COUNT * WIDTH, at, inside_vectors, HEADS, WIDE)
        key_total = tl.zeros([1, MANY, HEADS, WIDE], dtype=tl.float32)
        value_total = tl.zeros([1, MANY, HEADS, WIDE], dtype=tl.float32)
        for first in range(start, end, BYTES):
            rows = first + tl.arange(0, BYTES)[:, None, None]
            at_rows = rows.to(tl.int64) * (COUNT * WIDTH) + columns
            real = inside & (rows < end)
            q = _load(query, at_rows, real, HEADS, WIDE)
            g = _load(upstream, at_rows, real, HEADS, WIDE)
            weights = _weights(q, k, scale * _LOG2_E, is_vector[:, :, :, None])
            slopes = tl.sum(g * v, 3, keep_dims=True)
            slopes = weights * (slopes - tl.sum(weights * slopes, 1, keep_dims=True)) * scale
            _store(query_gradient, at_rows, real, tl.sum(slopes * k, 1, keep_dims=True))
            key_total += tl.sum(slopes * q, 0, keep_dims=True)
            value_total += tl.sum(weights * g, 0, keep_dims=True)
        if last - begin > CHUNK:
            at = (row * VECTORS + vectors) * (2 * COUNT * WIDTH) + columns
            _store(buffer, at, inside_vectors, key_total)
            _store(buffer + COUNT * WIDTH, at, inside_vectors, value_total)
        else:
            _store(gradient, at, inside_vectors, key_total)
            _store(gradient + COUNT * WIDTH, at, inside_vectors, value_total)


@triton.jit
def _mixed(highest, total, mixed, scores, values):
    """Softmax by running maxima: add values, [more, ...], by their scores to what was mixed before.

    Every column has a score that is not -inf.
    """
    higher = tl.maximum(highest, tl.max(scores, 0, keep_dims=True))
    weights = tl.exp2(scores - higher)
    fade = tl.exp2(highest - higher)
    total = total * fade + tl.sum(weights, 0, keep_dims=True)
    return higher, total, mixed * fade + tl.sum(weights * values, 0, keep_dims=True)


@triton.jit(do_not_specialize=["num_windows"])
def _patches_read(
    query, key_value, ids, offsets, output, sums, buffer, buffer_sums, num_windows, scale, VECTORS: tl.constexpr,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, MANY: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What a patch reads of a chunk of its bytes, and the logarithm of the sum of its weights."""
    blocks = tl.cdiv(COUNT, HEADS)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    patch, start, end, begin, last, row = chunk_of(program, ids, offsets, num_windows, CHUNK)
    if (program >= num_windows) | (start < end):
        columns, inside = _columns(block, HEADS, COUNT, WIDTH, WIDE)
        vectors = tl.arange(0, MANY)[None, :, None]
        at = (patch * VECTORS + vectors) * (COUNT * WIDTH) + columns
        q = _load(query, at, inside & (vectors < VECTORS), HEADS, WIDE)
        highest = tl.full([1, MANY, HEADS, 1], -float("inf"), dtype=tl.float32)
        total = tl.zeros([1, MANY, HEADS, 1], dtype=tl.float32)
        mixed = tl.zeros([1, MANY, HEADS, WIDE], dtype=tl.float32)
        for first in range(start, end, BYTES):
            rows = first + tl.arange(0, BYTES)[:, None, None]
            at_rows = rows.to(tl.int64) * (2 * COUNT * WIDTH) + columns
            real = inside & (rows < end)
            k = _load(key_value, at_rows, real, HEADS, WIDE)
            v = _load(key_value + COUNT * WIDTH, at_rows, real, HEADS, WIDE)
            scores = tl.where((rows < end)[:, :, :, None], tl.sum(q * k, 3, keep_dims=True) * scale, -float("inf"))
            highest, total, mixed = _mixed(highest, total, mixed, scores, v)
        # Empty patches have a total of 0.
        some = tl.where(total == 0, 1.0, total)
        mixed = mixed / some
        total = tl.where(total == 0, 0.0, highest + tl.log2(some))
        heads = block * HEADS + tl.arange(0, HEADS)[None, None, :]
        is_sum = (vectors < VECTORS) & (heads < COUNT)
        if last - begin > CHUNK:
            place = row * VECTORS + vectors
            _store(buffer, place * (COUNT * WIDTH) + columns, inside & (vectors < VECTORS), mixed)
            _store(buffer_sums, place * COUNT + heads, is_sum, total)
        else:
            _store(output, at, inside & (vectors < VECTORS), mixed)
            _store(sums, (patch * VECTORS + vectors) * COUNT + heads, is_sum, total)


@triton.jit(do_not_specialize=["num_windows", "length"])
def _join_mixed(
    buffer, buffer_sums, ids, offsets, output, sums, num_windows, length, VECTORS: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, MANY: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Mix what the chunks of a long patch gave, each by the sum of its weights."""
    blocks = tl.cdiv(COUNT, HEADS)
    window, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    patch, _, chunks = long_segment(window, ids, offsets, length, CHUNK)
    if chunks > 0:
        columns, inside = _columns(block, HEADS, COUNT, WIDTH, WIDE)
        heads = block * HEADS + tl.arange(0, HEADS)[None, None, :]
        vectors = tl.arange(0, MANY)[None, :, None]
        is_sum = (vectors < VECTORS) & (heads < COUNT)
        inside &= vectors < VECTORS
        at = (num_windows + window).to(tl.int64) * VECTORS + vectors
        mixed = _load(buffer, at * (COUNT * WIDTH) + columns, inside, HEADS, WIDE)
        highest = _load(buffer_sums, at * COUNT + heads, is_sum, HEADS, 1)
        total = tl.full([1, MANY, HEADS, 1], 1.0, dtype=tl.float32)
        for first in range(1, chunks, BYTES):
            rows = first + tl.arange(0, BYTES)[:, None, None]
            at_rows = (window + rows).to(tl.int64) * VECTORS + vectors
            real = rows < chunks
            scores = _load(buffer_sums, at_rows * COUNT + heads, is_sum & real, HEADS, 1)
            scores = tl.where(real[:, :, :, None], scores, -float("inf"))
            values = _load(buffer, at_rows * (COUNT * WIDTH) + columns, inside & real, HEADS, WIDE)
            highest, total, mixed = _mixed(highest, total, mixed, scores, values)
        at = patch * VECTORS + vectors
        _store(output, at * (COUNT * WIDTH) + columns, inside, mixed / total)
        _store(sums, at * COUNT + heads, is_sum, highest + tl.log2(total))


@triton.jit(do_not_specialize=["num_windows"])
def _patches_read_gradient(
    upstream, query, key_value, ids, offsets, output, sums, query_gradient, gradient, buffer, num_windows, scale,
    VECTORS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, MANY: tl.constexpr, HEADS: tl.constexpr,
    WIDE: tl.constexpr, BYTES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's keys and values, and what the chunk gives to the patch's queries."""
    blocks = tl.cdiv(COUNT, HEADS)
    program, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    patch, start, end, begin, last, row = chunk_of(program, ids, offsets, num_windows, CHUNK)
    if (program >= num_windows) | (start < end):
        columns, inside = _columns(block, HEADS, COUNT, WIDTH, WIDE)
        heads = block * HEADS + tl.arange(0, HEADS)[None, None, :]
        vectors = tl.arange(0, MANY)[None, :, None]
        inside_vectors = inside & (vectors < VECTORS)
        at = (patch * VECTORS + vectors) * (COUNT * WIDTH) + columns
        q = _load(query, at, inside_vectors, HEADS, WIDE)
        g = _load(upstream, at, inside_vectors, HEADS, WIDE)
        mean = tl.sum(_load(output, at, inside_vectors, HEADS, WIDE) * g, 3, keep_dims=True)
        is_sum = (vectors < VECTORS) & (heads < COUNT)
        sum_ = _load(sums, (patch * VECTORS + vectors) * COUNT + heads, is_sum, HEADS, 1)
        query_total = tl.zeros([1, MANY, HEADS, WIDE], dtype=tl.float32)
        for first in range(start, end, BYTES):
            rows = first + tl.arange(0, BYTES)[:, None, None]
            at_rows = rows.to(tl.int64) * (2 * COUNT * WIDTH) + columns
            real = inside & (rows < end)
            k = _load(key_value, at_rows, real, HEADS, WIDE)
            v = _load(key_value + COUNT * WIDTH, at_rows, real, HEADS, WIDE)
            scores = tl.sum(q * k, 3, keep_dims=True) * (scale * _LOG2_E) - sum_
            weights = tl.exp2(tl.where((rows < end)[:, :, :, None], scores, -float("inf")))
            slopes = weights * (tl.sum(g * v, 3, keep_dims=True) - mean) * scale
            _store(gradient, at_rows, real, tl.sum(slopes * q, 1, keep_dims=True))
            _store(gradient + COUNT * WIDTH, at_rows, real, tl.sum(weights * g, 1, keep_dims=True))
            query_total += tl.sum(slopes * k, 0, keep_dims=True)
        if last - begin > CHUNK:
            at = (row * VECTORS + vectors) * (COUNT * WIDTH) + columns
            _store(buffer, at, inside_vectors, query_total)
        else:
            _store(query_gradient, at, inside_vectors, query_total)


@dataclass(frozen=True, slots=True)
class _Launch:
    """Everything but tensors that the kernels of one call take."""

    length: int
    """T."""
    count: int
    """P."""
    vectors: int
    heads: int
    width: int
    cut: Cut

    @classmethod
    def of(cls, ids: Tensor, of_patches: Tensor, cut: Cut | None) -> _Launch:
        """For tensors of a patch, [P, K, ..., H, E]."""
        vectors, heads, width = of_patches.shape[1], *of_patches.shape[-2:]
        return cls(
            len(ids), len(of_patches), vectors, heads, width, cut_for(vectors, heads, width) if cut is None else cut
        )

    @property
    def blocks(self) -> int:
        """Programs for the heads of one chunk."""
        return -(-self.heads // self.cut.heads)

    @property
    def grid(self) -> tuple[int]:
        """A program for some heads of every chunk."""
        return (self.blocks * (windows(self.length) + self.count),)

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.width**-0.5)

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        return {
            "VECTORS": self.vectors,
            "COUNT": self.heads,
            "WIDTH": self.width,
            "MANY": _power(self.vectors),
            "HEADS": self.cut.heads,
            "WIDE": _power(self.width),
            "BYTES": self.cut.bytes,
            "CHUNK": CHUNK,
            "num_warps": self.cut.warps,
        }


def bytes_read(query: Tensor, key_value: Tensor, ids: Tensor, offsets: Tensor, *, cut: Cut | None = None) -> Tensor:
    """Attention of every byte to the vectors of one patch.

    Args:
        query: [T, H, E] of float16, bfloat16 or float32, as all tensors of numbers here contiguous.
        key_value: [P, K, 2, H, E], the keys first.
        ids: [T] integers, never decreasing: the patch that a byte reads.
        offsets: [P + 1] integers: where the bytes of a patch begin.
        cut: None for the usual.

    Returns:
        [T, H, E] of the query's dtype.
    """
    launch = _Launch.of(ids, key_value, cut)
    output = torch.empty_like(query)
    if output.numel():
        _bytes_read[launch.grid](
            query, key_value, ids, offsets, output, windows(launch.length), launch.scale * LOG2_E,
            **launch.constants,
        )  # fmt: skip
    return output


def bytes_read_gradient(
    upstream: Tensor, query: Tensor, key_value: Tensor, ids: Tensor, offsets: Tensor, *, cut: Cut | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `bytes_read`'s query and key_value for that of its result, [T, H, E]."""
    launch = _Launch.of(ids, key_value, cut)
    query_gradient, gradient = torch.empty_like(query), torch.empty_like(key_value)
    if gradient.numel():
        buffer = new_buffer(query, launch.length, gradient[0].numel())
        _bytes_read_gradient[launch.grid](
            upstream, query, key_value, ids, offsets, query_gradient, gradient, buffer, windows(launch.length),
            launch.scale, **launch.constants,
        )  # fmt: skip
        join(buffer, ids, offsets, gradient)
    return query_gradient, gradient


def patches_read(
    query: Tensor, key_value: Tensor, ids: Tensor, offsets: Tensor, *, cut: Cut | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a patch's vectors to the bytes of that patch.

    Args:
        query: [P, K, H, E] of float16, bfloat16 or float32, as all tensors of numbers here contiguous.
        key_value: [T, 2, H, E], the keys first.
        ids: [T] integers, never decreasing: the patch that holds a byte.
        offsets: [P + 1] integers: where a patch begins.
        cut: None for the usual.

    Returns:
        [P, K, H, E] of the query's dtype, 0 for empty patches; and float32 [P, K, H], the base-2 logarithms of the
        sums of the weights.
    """
    launch = _Launch.of(ids, query, cut)
    output, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
    if output.numel():
        buffer = new_buffer(query, launch.length, output[0].numel())
        buffer_sums = new_buffer(query, launch.length, sums[0].numel())
        _patches_read[launch.grid](
            query, key_value, ids, offsets, output, sums, buffer, buffer_sums, windows(launch.length),
            launch.scale * LOG2_E, **launch.constants,
        )  # fmt: skip
        if launch.length:
            _join_mixed[(launch.blocks * windows(launch.length),)](
                buffer, buffer_sums, ids, offsets, output, sums, windows(launch.length), launch.length,
                **launch.constants,
            )  # fmt: skip
    return output, sums


def patches_read_gradient(
    upstream: Tensor,
    query: Tensor,
    key_value: Tensor,
    ids: Tensor,
    offsets: Tensor,
    output: Tensor,
    sums: Tensor,
    *,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `patches_read`'s query and key_value for that of its result, [P, K, H, E]."""
    launch = _Launch.of(ids, query, cut)
    query_gradient, gradient = torch.empty_like(query), torch.empty_like(key_value)
    if query_gradient.numel():
        buffer = new_buffer(query, launch.length, query_gradient[0].numel())
        _patches_read_gradient[launch.grid](
            upstream, query, key_value, ids, offsets, output, sums, query_gradient, gradient, buffer,
            windows(launch.length), launch.scale, **launch.constants,
        )  # fmt: skip
        join(buffer, ids, offsets, query_gradient)
    return query_gradient, gradient
