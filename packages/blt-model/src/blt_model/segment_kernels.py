"""Triton kernels over segments: how segments are cut into work, how the parts of one are joined, and pooling.

Most segments are short, and some are very long (padding is one), so they are cut into chunks of CHUNK positions, and a
program takes one chunk. Which one it is, it reads from ids and offsets alone: the host need not know the segments, and
no plan is made.

- A program for every segment takes its first chunk.
- A program for every window of CHUNK positions takes the later chunk that begins in its window. There is at most one,
  as a later chunk has at least CHUNK positions of its segment before it.

Results of a long segment's chunks go to a buffer in float32: those of later chunks to the row of their window, in the
lower half; those of first chunks to the upper half, to the row of the window in which the segment begins. The program
of that window joins them, for the chunks of a segment begin in neighbouring windows. So sums are taken in one order
always, and no program works much longer than others.

This module needs triton; import it only for tensors on CUDA (or under Triton's interpreter).

Legend: T positions, P segments, N windows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
"""Positions that a program takes, at most."""
SUM, MEAN, SHARE, MAXIMUM = 0, 1, 2, 3
"""What is made of a segment: its sum, its mean, the upstream gradient divided by its sum, its maximum."""
_MEAN, _SHARE, _MAXIMUM = tl.constexpr(MEAN), tl.constexpr(SHARE), tl.constexpr(MAXIMUM)
_COLUMNS, _ROWS = 256, 8
"""Of a tile in pooling and in joining."""


def windows(length: int) -> int:
    """N, for T positions."""
    return int(triton.cdiv(length, CHUNK))


def new_buffer(like: Tensor, length: int, width: int) -> Tensor:
    """Room for what chunks give, float32 [2 * N, width]; only rows that were written are read."""
    return like.new_empty((2 * windows(length), width), dtype=torch.float32)


@triton.jit
def chunk_of(program, ids, offsets, num_windows, CHUNK: tl.constexpr):
    """The chunk of a program; those of the windows, which may work longest, come first.

    Returns the segment, the chunk's start and end, equal where the program has nothing to read, the segment's begin and
    end, and the row of the buffer.
    """
    if program < num_windows:
        position = program * CHUNK
        segment = tl.load(ids + position).to(tl.int64)
        begin = tl.load(offsets + segment).to(tl.int32)
        last = tl.load(offsets + segment + 1).to(tl.int32)
        start = begin + tl.cdiv(position - begin, CHUNK) * CHUNK
        # A first chunk has a program of its own.
        start = tl.where(start == begin, last, tl.minimum(start, last))
        row = program
    else:
        segment = (program - num_windows).to(tl.int64)
        begin = tl.load(offsets + segment).to(tl.int32)
        last = tl.load(offsets + segment + 1).to(tl.int32)
        start = begin
        row = num_windows + begin // CHUNK
    return segment, start, tl.minimum(start + CHUNK, last), begin, last, row.to(tl.int64)


@triton.jit
def long_segment(window, ids, offsets, length, CHUNK: tl.constexpr):
    """The segment of several chunks that begins in a window: its number, length and chunks (0 if there is none)."""
    after = (window + 1) * CHUNK
    segment = tl.load(ids + tl.minimum(after, length - 1)).to(tl.int64)
    begin = tl.load(offsets + segment).to(tl.int32)
    size = tl.load(offsets + segment + 1).to(tl.int32) - begin
    is_here = (after < length) & (begin >= after - CHUNK) & (begin < after) & (size > CHUNK)
    return segment, size, tl.where(is_here, tl.cdiv(size, CHUNK), 0)


@triton.jit
def _finished(total, size, upstream, at, inside, MODE: tl.constexpr):
    """What is made of a segment, from its sum or maximum."""
    if MODE == _MEAN:
        total = total / tl.maximum(size, 1)
    if MODE == _SHARE:
        total = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32) / tl.maximum(total, 1.0)
    return total


@triton.jit(do_not_specialize=["num_windows", "length"])
def _join(
    buffer, ids, offsets, upstream, result, num_windows, length, WIDTH: tl.constexpr, MODE: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of the long segment that begins in a window."""
    window = tl.program_id(0)
    segment, size, chunks = long_segment(window, ids, offsets, length, CHUNK)
    if chunks > 0:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        first = buffer + (num_windows + window).to(tl.int64) * WIDTH + columns
        total = tl.load(first, mask=inside, other=0.0)
        later = buffer + window.to(tl.int64) * WIDTH + columns[None, :]
        for chunk in range(1, chunks, ROWS):
            rows = (chunk + tl.arange(0, ROWS))[:, None]
            real = (rows < chunks) & inside[None, :]
            if MODE == _MAXIMUM:
                part = tl.load(later + rows * WIDTH, mask=real, other=-float("inf"))
                total = tl.maximum(total, tl.max(part, 0))
            else:
                total += tl.sum(tl.load(later + rows * WIDTH, mask=real, other=0.0), 0)
        at = segment * WIDTH + columns
        total = _finished(total, size, upstream, at, inside, MODE)
        tl.store(result + at, total.to(result.dtype.element_ty), mask=inside)


def join(
    buffer: Tensor, ids: Tensor, offsets: Tensor, result: Tensor, *, mode: int = SUM, upstream: Tensor | None = None
) -> None:
    """Write the rows of long segments.

    Args:
        buffer: what their chunks gave, as `new_buffer` made it.
        ids: [T] integers.
        offsets: [P + 1] integers.
        result: [P, ...], contiguous, with as many numbers in a row as the buffer; rows of others stay as they are.
        mode: SUM, MEAN, SHARE or MAXIMUM.
        upstream: for SHARE, contiguous and of the result's shape.
    """
    width = buffer.shape[1]
    if not ids.numel():
        return
    _join[(windows(len(ids)), triton.cdiv(width, _COLUMNS))](
        buffer,
        ids,
        offsets,
        buffer if upstream is None else upstream,
        result,
        windows(len(ids)),
        len(ids),
        WIDTH=width,
        MODE=mode,
        CHUNK=CHUNK,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=2,
    )


@triton.jit(do_not_specialize=["num_windows"])
def _pool(
    values, ids, offsets, largest, upstream, result, buffer, num_windows, WIDTH: tl.constexpr, MODE: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of a chunk; SHARE sums how many values equal the largest of their segment."""
    program = tl.program_id(0)
    segment, start, end, begin, last, row = chunk_of(program, ids, offsets, num_windows, CHUNK)
    if (program >= num_windows) | (start < end):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        at = segment * WIDTH + columns
        total = tl.full([COLUMNS], -float("inf") if MODE == _MAXIMUM else 0.0, dtype=tl.float32)
        most = total
        if MODE == _SHARE:
            most = tl.load(largest + at, mask=inside, other=0.0).to(tl.float32)
        for first in range(start, end, ROWS):
            rows = (first + tl.arange(0, ROWS))[:, None]
            real = (rows < end) & inside[None, :]
            value = tl.load(values + rows.to(tl.int64) * WIDTH + columns[None, :], mask=real, other=0.0).to(tl.float32)
            if MODE == _MAXIMUM:
                total = tl.maximum(total, tl.max(tl.where(real, value, -float("inf")), 0))
            elif MODE == _SHARE:
                total += tl.sum(tl.where(real & (value == most[None, :]), 1.0, 0.0), 0)
            else:
                total += tl.sum(value, 0)
        if last - begin > CHUNK:
            tl.store(buffer + row * WIDTH + columns, total, mask=inside)
        else:
            if MODE == _MAXIMUM:
                total = tl.where(begin < last, total, 0.0)
            total = _finished(total, last - begin, upstream, at, inside, MODE)
            tl.store(result + at, total.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _spread(
    values, ids, offsets, largest, shares, gradient, length, WIDTH: tl.constexpr, MODE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of some positions: for MEAN of their segment's over its length, for SHARE where they are largest."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    real = rows < length
    segment = tl.load(ids + rows, mask=real, other=0).to(tl.int64)
    inside = real & (columns < WIDTH)
    own = segment * WIDTH + columns
    at = rows.to(tl.int64) * WIDTH + columns
    share = tl.load(shares + own, mask=inside, other=0.0).to(tl.float32)
    if MODE == _MEAN:
        size = tl.load(offsets + segment + 1, mask=real, other=1) - tl.load(offsets + segment, mask=real, other=0)
        share = share / size.to(tl.float32)
    else:
        value = tl.load(values + at, mask=inside, other=0.0)
        share = tl.where(value == tl.load(largest + own, mask=inside, other=0.0), share, 0.0)
    tl.store(gradient + at, share.to(gradient.dtype.element_ty), mask=inside)


def _reduce(
    values: Tensor, ids: Tensor, offsets: Tensor, mode: int, largest: Tensor | None, upstream: Tensor | None
) -> Tensor:
    """[T, ...] to [P, ...], in the values' dtype, or where shares are made float32."""
    count, width = len(offsets) - 1, math.prod(values.shape[1:])
    dtype = torch.float32 if mode == SHARE else values.dtype
    result = values.new_empty((count, *values.shape[1:]), dtype=dtype)
    if not result.numel():
        return result
    buffer = new_buffer(values, len(values), width)
    _pool[(windows(len(values)) + count, triton.cdiv(width, _COLUMNS))](
        values,
        ids,
        offsets,
        values if largest is None else largest,
        values if upstream is None else upstream,
        result,
        buffer,
        windows(len(values)),
        WIDTH=width,
        MODE=mode,
        CHUNK=CHUNK,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=1,
    )
    join(buffer, ids, offsets, result, mode=mode, upstream=upstream)
    return result


def maximum(values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Largest values.

    Args:
        values: [T, ...] of float16, bfloat16 or float32, contiguous.
        ids: [T] integers.
        offsets: [P + 1] integers.

    Returns:
        [P, ...] of the values' dtype, 0 for empty segments.
    """
    return _reduce(values, ids, offsets, MAXIMUM, None, None)


def mean(values: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Means, summed in float32; otherwise as `maximum`."""
    return _reduce(values, ids, offsets, MEAN, None, None)


def _gradient(
    values: Tensor, ids: Tensor, offsets: Tensor, largest: Tensor, shares: Tensor, mode: int, gradient: Tensor
) -> Tensor:
    if not gradient.numel():
        return gradient
    width = gradient[:1].numel()
    _spread[(triton.cdiv(len(ids), _ROWS), triton.cdiv(width, _COLUMNS))](
        values, ids, offsets, largest, shares, gradient, len(ids), WIDTH=width, MODE=mode, ROWS=_ROWS,
        COLUMNS=_COLUMNS, num_warps=1,
    )  # fmt: skip
    return gradient


def maximum_gradient(upstream: Tensor, values: Tensor, result: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of `maximum`, shared equally by the positions that hold the largest value.

    Args:
        upstream: [P, ...], contiguous.
        values: [T, ...] as given to `maximum`.
        result: [P, ...] as it gave.
        ids: [T] integers.
        offsets: [P + 1] integers.

    Returns:
        [T, ...] of the values' dtype.
    """
    shares = _reduce(values, ids, offsets, SHARE, result, upstream)
    return _gradient(values, ids, offsets, result, shares, SHARE, torch.empty_like(values))


def mean_gradient(upstream: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of `mean`, [T, ...] of the upstream gradient's dtype, [P, ...] and contiguous."""
    gradient = upstream.new_empty((len(ids), *upstream.shape[1:]))
    return _gradient(upstream, ids, offsets, upstream, upstream, MEAN, gradient)
