"""Triton kernels that add gradients to the rows of a table: each row that occurs is read and written once.

The occurrences of rows are sorted, so that those of one row are neighbours (a run), in the order of their tokens. Runs
are summed in chunks of at most CHUNK occurrences, one program each: most runs are a single chunk, whose sum is added to
the table at once. The full chunks of longer runs (padding, frequent n-grams) leave their sums in a buffer, and a second
kernel adds them up. So no program works much longer than others, nothing is summed in an order that could change, and
the host need not know how many distinct rows there are.

This module needs triton; import it only for tensors on CUDA (or under Triton's interpreter).

Legend: N occurrences, M rows of each token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
"""Occurrences that a program sums."""
WIDEST = 1024
"""Columns that a program works on, at most."""


@triton.jit
def _sum(
    values, weights, order, first, end, columns, inside, ROWS: tl.constexpr, DIM: tl.constexpr, WEIGHTED: tl.constexpr,
    SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the values of occurrences [first, end), in their order."""
    total = tl.zeros([BLOCK], dtype=SUM)
    for place in range(first, end):
        occurrence = tl.load(order + place)
        value = tl.load(values + (occurrence // ROWS) * DIM + columns, mask=inside, other=0.0).to(SUM)
        if WEIGHTED:
            value *= tl.load(weights + occurrence).to(SUM)
        total += value
    return total


@triton.jit
def _add(total, row, columns, inside, sums, DIM: tl.constexpr, SUM: tl.constexpr):
    """Add sums to a row of the table."""
    target = total + row * DIM + columns
    before = tl.load(target, mask=inside, other=0.0).to(SUM)
    tl.store(target, (before + sums).to(total.dtype.element_ty), mask=inside)


@triton.jit
def _add_chunks(
    total, buffer, values, weights, keys, order, starts, ends, ROWS: tl.constexpr, DIM: tl.constexpr,
    WEIGHTED: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add the runs of one chunk to the table, and put the sums of the full chunks of longer ones into the buffer."""
    place = tl.program_id(0)
    start = tl.load(starts + place)
    end = tl.load(ends + place)
    is_short = end - start <= CHUNK
    if ((place - start) % CHUNK == 0) & (is_short | (place + CHUNK <= end)):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < DIM
        last = tl.minimum(place + CHUNK, end)
        sums = _sum(values, weights, order, place, last, columns, inside, ROWS, DIM, WEIGHTED, SUM, BLOCK)
        if is_short:
            _add(total, tl.load(keys + place), columns, inside, sums, DIM, SUM)
        else:
            # Full chunks do not overlap, so no two begin in the same CHUNK places.
            slot = (place // CHUNK).to(tl.int64)
            tl.store(buffer + slot * DIM + columns, sums, mask=inside)


@triton.jit
def _add_long_runs(
    total, buffer, values, weights, keys, order, starts, ends, ROWS: tl.constexpr, DIM: tl.constexpr,
    WEIGHTED: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add the runs of more than a chunk to the table: their sums from the buffer, and what is left of them."""
    place = tl.program_id(0) * CHUNK
    start = tl.load(starts + place)
    end = tl.load(ends + place)
    # Every such run holds a multiple of CHUNK; the program of the first one takes it.
    if (end - start > CHUNK) & (place - start < CHUNK):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < DIM
        full = (end - start) // CHUNK
        slot = (start // CHUNK).to(tl.int64)
        sums = tl.zeros([BLOCK], dtype=SUM)
        for chunk in range(full):
            sums += tl.load(buffer + (slot + chunk) * DIM + columns, mask=inside, other=0.0)
        rest = start + full * CHUNK
        sums += _sum(values, weights, order, rest, end, columns, inside, ROWS, DIM, WEIGHTED, SUM, BLOCK)
        _add(total, tl.load(keys + place), columns, inside, sums, DIM, SUM)


def add_rows(total: Tensor, rows: Tensor, values: Tensor, weights: Tensor | None) -> None:
    """Add values[t] * weights[t, m] to total[rows[t, m]] for all t and m, in place, summed in at least float32.

    Beside what sorting takes, memory of 1 / CHUNK of the gathered values is used.

    Args:
        total: [rows, dim], contiguous.
        rows: int64 [T, M].
        values: [T, dim] of any floating dtype.
        weights: [T, M]; None where all are 1.
    """
    count, dim = rows.numel(), total.shape[1]
    if not count:
        return
    keys, order = torch.sort(rows.flatten(), stable=True)
    starts = torch.searchsorted(keys, keys, out_int32=True)
    ends = torch.searchsorted(keys, keys, out_int32=True, right=True)
    is_double = total.dtype == torch.float64
    chunks = triton.cdiv(count, CHUNK)
    buffer = torch.empty(chunks, dim, dtype=torch.float64 if is_double else torch.float32, device=total.device)
    values = values.contiguous()
    weights = values if weights is None else weights.contiguous()
    block = min(WIDEST, triton.next_power_of_2(dim))
    tensors = (total, buffer, values, weights, keys, order, starts, ends)
    for kernel, programs in ((_add_chunks, count), (_add_long_runs, chunks)):
        kernel[(programs, triton.cdiv(dim, block))](
            *tensors,
            ROWS=rows.shape[1],
            DIM=dim,
            WEIGHTED=weights is not values,
            SUM=tl.float64 if is_double else tl.float32,
            BLOCK=block,
            CHUNK=CHUNK,
            num_warps=max(1, block // 256),
        )
