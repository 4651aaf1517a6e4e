"""Triton kernels for causal self-attention over packed documents with a sliding window, tile by tile.

A query reads one run of keys, from `first[query]` to its own, and both ends grow with the query. So a tile of queries
reads one run of tiles of keys, in the middle of which nothing is masked; and a tile of keys is read by one run of
queries, from the token of its first key to `ends[key]`, the number of queries whose run begins at that key or before.
No other plan is needed, and nothing depends on the documents but how often a loop runs.

- `_attention_forward`: a tile of queries of one head; softmax by running maxima, base 2.
- `_attention_query_gradient`: the same tiles again; also writes each query's sum of result times upstream gradient.
- `_attention_key_gradient`: a tile of keys of one key head, over all query heads that share it; scores are made
  transposed, so that every second factor of a product is what was loaded, and every first one stays in registers.

Each output is written by one program in one order: results are equal from run to run to the bit. Sums are float32.
This module needs triton; import it only where `tile_attention` says so.

Legend: T queries, C carried keys, H query heads, G key and value heads, E head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from blt_model.tile_attention import TILE

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-1e30)
"""Where running maxima begin: a query's first tiles may be masked whole, and -inf - -inf is no number."""
_TILE = tl.constexpr(TILE)
"""The forward kernel's own tiles divide it."""
_PLAIN, _MASKED, _EITHER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How a kernel cuts its work."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Tiles of the loop that are under way at once."""
    one_loop: bool = True
    """Each tile asks whether it needs the mask; else there are three loops, the middle one without."""
    bulk: bool = True
    """Whether tiles are fetched whole by the copy engine, where device (compute capability 9) and strides let it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The tiles of the three kernels."""

    forward: Tiles
    query_gradient: Tiles
    key_gradient: Tiles


HALF = {
    64: Plan(
        forward=Tiles(queries=64, keys=64, warps=4, stages=2),
        query_gradient=Tiles(queries=64, keys=32, warps=4, stages=3, one_loop=False),
        key_gradient=Tiles(queries=32, keys=64, warps=4, stages=3),
    ),
    128: Plan(
        forward=Tiles(queries=64, keys=64, warps=4, stages=3),
        query_gradient=Tiles(queries=64, keys=64, warps=4, stages=2),
        key_gradient=Tiles(queries=32, keys=64, warps=4, stages=3),
    ),
    256: Plan(
        forward=Tiles(queries=64, keys=64, warps=8, stages=2),
        query_gradient=Tiles(queries=64, keys=32, warps=8, stages=2),
        key_gradient=Tiles(queries=32, keys=64, warps=8, stages=2),
    ),
}
"""In half precision, by the head width up to which it holds."""
SINGLE = {
    64: Plan(
        forward=Tiles(queries=64, keys=32, warps=8, stages=2, bulk=False),
        query_gradient=Tiles(queries=32, keys=32, warps=8, stages=2, bulk=False),
        key_gradient=Tiles(queries=32, keys=32, warps=8, stages=2, bulk=False),
    ),
    128: Plan(
        forward=Tiles(queries=32, keys=32, warps=8, stages=1, bulk=False),
        query_gradient=Tiles(queries=32, keys=32, warps=8, stages=1, bulk=False),
        key_gradient=Tiles(queries=32, keys=32, warps=8, stages=1, bulk=False),
    ),
    256: Plan(
        forward=Tiles(queries=16, keys=16, warps=4, stages=1, bulk=False),
        query_gradient=Tiles(queries=16, keys=16, warps=4, stages=1, bulk=False),
        key_gradient=Tiles(queries=16, keys=16, warps=4, stages=1, bulk=False),
    ),
}
"""In float32, which goes through no matrix units and so needs its numbers in registers, which limits the tiles."""


def tiles_for(width: int, dtype: torch.dtype) -> Plan:
    """The tiles for heads of a width."""
    table = SINGLE if dtype == torch.float32 else HALF
    return next(plan for limit, plan in table.items() if width <= limit)


@triton.jit
def _tile(source, start, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, BULK: tl.constexpr):
    """Rows `start` on of one head, [ROWS, WIDTH]; zeros after the last row, unless the tile is known to be whole.

    A source is a pointer (or with BULK a descriptor), the head's first column, the step from row to row, and the rows.
    """
    base, column, step, count = source
    if BULK:
        tile = base.load([start, column])
    else:
        rows = tl.arange(0, ROWS)
        at = base + column + start * step + rows[:, None] * step + tl.arange(0, WIDTH)[None, :]
        tile = tl.load(at) if WHOLE else tl.load(at, mask=(start + rows < count)[:, None], other=0.0)
    return tile


@triton.jit
def _masked(scores, at, start, limits, MASK: tl.constexpr):
    """Scores where `low` <= `at` < `high`, -inf elsewhere; a tile that starts in the plain run is wanted whole."""
    low, high, plain_low, plain_high = limits
    if MASK == _MASKED:
        scores = tl.where((at >= low) & (at < high), scores, -float("inf"))
    elif MASK == _EITHER:  # noqa: SIM102  # decided by the compiler; the next is decided by the program
        if (start < plain_low) | (start >= plain_high):
            scores = tl.where((at >= low) & (at < high), scores, -float("inf"))
    return scores


@triton.jit
def _keys_of(first, start, num_queries, carried, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The run of keys of queries `start` on, its unmasked part, and which of them each query reads."""
    rows = start + tl.arange(0, QUERIES)
    last = tl.minimum(start + QUERIES, num_queries) - 1
    low = tl.load(first + start)
    # In whole tiles from `low` on: that the tile's last query, whose reach is latest, and its first one read whole.
    plain_low = low + tl.cdiv(tl.load(first + last) - low, KEYS) * KEYS
    plain_high = low + (start + carried + 1 - low) // KEYS * KEYS
    plain_low = tl.minimum(plain_low, plain_high)
    reach = tl.load(first + rows, mask=rows < num_queries, other=0)
    return low, last + carried + 1, (reach[:, None], (rows + carried + 1)[:, None], plain_low, plain_high)


@triton.jit
def _forward_loop(
    state, q, keys, values, low, high, limits, scale,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Keys `low` to `high` for a tile of queries."""
    result, total, highest = state
    for start in range(low, high, KEYS):
        k = _tile(keys, start, KEYS, WIDTH, MASK == _PLAIN, BULK)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = _masked(scores, start + tl.arange(0, KEYS)[None, :], start, limits, MASK)
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 1)
        v = _tile(values, start, KEYS, WIDTH, MASK == _PLAIN, BULK)
        result = tl.dot(weights.to(v.dtype), v, result * fade[:, None], input_precision=PRECISION)
        highest = higher
    return result, total, highest


@triton.jit
def _own_tile(tiles, count, index, num_queries, QUERIES: tl.constexpr):
    """Begin and end of a program's queries; nothing where there are more programs than tiles."""
    if tiles is None:
        start = index * QUERIES
        stop = num_queries
    else:
        parts: tl.constexpr = _TILE // QUERIES
        start = tl.load(tiles + index // parts) + index % parts * QUERIES
        stop = tl.load(tiles + count + index // parts)
    return start, stop


@triton.jit(do_not_specialize=["num_tiles", "num_queries", "carried", "num_heads", "repeats"])
def _attention_forward(
    query, key, value, first, tiles, output, sums, num_tiles, query_step, query_head, key_step, key_head, value_step,
    value_head, num_queries, carried, num_heads, repeats, scale, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, ONE_LOOP: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; heads vary fastest, and late tiles, of long documents, come first."""
    head = tl.program_id(0) % num_heads
    index = tl.num_programs(0) // num_heads - 1 - tl.program_id(0) // num_heads
    start, stop = _own_tile(tiles, num_tiles, index, num_queries, QUERIES)
    if start >= stop:
        return
    rows = start + tl.arange(0, QUERIES)
    real = rows < stop
    low, high, limits = _keys_of(first, start, stop, carried, QUERIES, KEYS)
    keys = (key, head // repeats * key_head, key_step.to(tl.int64), num_queries + carried)
    values = (value, head // repeats * value_head, value_step.to(tl.int64), num_queries + carried)
    queries = (query, head * query_head, query_step.to(tl.int64), num_queries)
    q = _tile(queries, start, QUERIES, WIDTH, False, BULK)
    result = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    state = (result, total, tl.full([QUERIES], _LEAST, dtype=tl.float32))
    scale *= _LOG2_E
    if ONE_LOOP:
        state = _forward_loop(state, q, keys, values, low, high, limits, scale, KEYS, WIDTH, _EITHER, PRECISION, BULK)
    else:
        a, b = limits[2], limits[3]
        state = _forward_loop(state, q, keys, values, low, a, limits, scale, KEYS, WIDTH, _MASKED, PRECISION, BULK)
        state = _forward_loop(state, q, keys, values, a, b, limits, scale, KEYS, WIDTH, _PLAIN, PRECISION, BULK)
        state = _forward_loop(state, q, keys, values, b, high, limits, scale, KEYS, WIDTH, _MASKED, PRECISION, BULK)
    result, total, highest = state
    result *= (1.0 / total)[:, None]
    at = rows.to(tl.int64)[:, None] * (num_heads * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(output + at, result.to(output.dtype.element_ty), mask=real[:, None])
    tl.store(sums + head.to(tl.int64) * num_queries + rows, (highest + tl.log2(total)) * _LN_2, mask=real)


@triton.jit
def _query_gradient_loop(
    total, q, g, sum_, delta, keys, values, low, high, limits, scale,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """As `_forward_loop`, for the gradient of the queries."""
    for start in range(low, high, KEYS):
        k = _tile(keys, start, KEYS, WIDTH, MASK == _PLAIN, BULK)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - sum_[:, None]
        scores = _masked(scores, start + tl.arange(0, KEYS)[None, :], start, limits, MASK)
        weights = tl.exp2(scores)
        v = _tile(values, start, KEYS, WIDTH, MASK == _PLAIN, BULK)
        slopes = tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        total = tl.dot((weights * slopes).to(k.dtype), k, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_queries", "carried", "num_heads", "repeats"])
def _attention_query_gradient(
    query, key, value, upstream, first, output, sums, deltas, gradient, query_step, query_head, key_step, key_head,
    value_step, value_head, upstream_step, upstream_head, num_queries, carried, num_heads, repeats, scale,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, ONE_LOOP: tl.constexpr, PRECISION: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries of one head, and its deltas."""
    head = tl.program_id(0) % num_heads
    start = (tl.num_programs(0) // num_heads - 1 - tl.program_id(0) // num_heads) * QUERIES
    rows = start + tl.arange(0, QUERIES)
    real = rows < num_queries
    low, high, limits = _keys_of(first, start, num_queries, carried, QUERIES, KEYS)
    keys = (key, head // repeats * key_head, key_step.to(tl.int64), num_queries + carried)
    values = (value, head // repeats * value_head, value_step.to(tl.int64), num_queries + carried)
    queries = (query, head * query_head, query_step.to(tl.int64), num_queries)
    slopes = (upstream, head * upstream_head, upstream_step.to(tl.int64), num_queries)
    g = _tile(slopes, start, QUERIES, WIDTH, False, BULK)
    at = rows.to(tl.int64)[:, None] * (num_heads * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    o = tl.load(output + at, mask=real[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    sums_at = head.to(tl.int64) * num_queries + rows
    tl.store(deltas + sums_at, delta, mask=real)
    sum_ = tl.load(sums + sums_at, mask=real, other=0.0) * _LOG2_E
    q = _tile(queries, start, QUERIES, WIDTH, False, BULK)
    total = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    scale2 = scale * _LOG2_E
    if ONE_LOOP:
        total = _query_gradient_loop(
            total, q, g, sum_, delta, keys, values, low, high, limits, scale2, KEYS, WIDTH, _EITHER, PRECISION, BULK
        )
    else:
        a, b = limits[2], limits[3]
        total = _query_gradient_loop(
            total, q, g, sum_, delta, keys, values, low, a, limits, scale2, KEYS, WIDTH, _MASKED, PRECISION, BULK
        )
        total = _query_gradient_loop(
            total, q, g, sum_, delta, keys, values, a, b, limits, scale2, KEYS, WIDTH, _PLAIN, PRECISION, BULK
        )
        total = _query_gradient_loop(
            total, q, g, sum_, delta, keys, values, b, high, limits, scale2, KEYS, WIDTH, _MASKED, PRECISION, BULK
        )
    tl.store(gradient + at, (total * scale).to(gradient.dtype.element_ty), mask=real[:, None])


@triton.jit
def _key_gradient_loop(
    totals, k, v, queries, slopes, sums, deltas, low, high, limits, scale, count,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Queries `low` to `high` for a tile of keys; the limits are of queries."""
    key_total, value_total = totals
    for start in range(low, high, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        q = _tile(queries, start, QUERIES, WIDTH, MASK == _PLAIN, BULK)
        g = _tile(slopes, start, QUERIES, WIDTH, MASK == _PLAIN, BULK)
        if MASK == _PLAIN:
            sum_ = tl.load(sums + rows)
            delta = tl.load(deltas + rows)
        else:
            sum_ = tl.load(sums + rows, mask=rows < count, other=0.0)
            delta = tl.load(deltas + rows, mask=rows < count, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - (sum_ * _LOG2_E)[None, :]
        scores = _masked(scores, rows[None, :], start, limits, MASK)
        weights = tl.exp2(scores)
        value_total = tl.dot(weights.to(g.dtype), g, value_total, input_precision=PRECISION)
        slope = tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :]
        key_total = tl.dot((weights * slope).to(q.dtype), q, key_total, input_precision=PRECISION)
    return key_total, value_total


@triton.jit
def _queries_of(ends, start, num_queries, carried, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The run of queries that read keys `start` on, its unmasked part, and which of them read each key."""
    columns = start + tl.arange(0, KEYS)
    last = tl.minimum(start + KEYS, num_queries + carried) - 1
    low = tl.maximum(start - carried, 0)
    plain_high = low + tl.maximum(tl.load(ends + start) - low, 0) // QUERIES * QUERIES
    plain_low = tl.minimum(low + tl.cdiv(tl.maximum(last - carried - low, 0), QUERIES) * QUERIES, plain_high)
    end = tl.load(ends + columns, mask=columns < num_queries + carried, other=0)
    return low, tl.load(ends + last), ((columns - carried)[:, None], end[:, None], plain_low, plain_high)


@triton.jit(do_not_specialize=["num_queries", "carried", "kv_heads"])
def _attention_key_gradient(
    query, key, value, upstream, ends, sums, deltas, key_gradient, value_gradient, query_step, query_head, key_step,
    key_head, value_step, value_head, upstream_step, upstream_head, num_queries, carried, kv_heads, scale,
    REPEATS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, ONE_LOOP: tl.constexpr,
    PRECISION: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one head; early keys, of long documents, come first."""
    kv_head = tl.program_id(0) % kv_heads
    start = tl.program_id(0) // kv_heads * KEYS
    count = num_queries + carried
    low, high, limits = _queries_of(ends, start, num_queries, carried, QUERIES, KEYS)
    k = _tile((key, kv_head * key_head, key_step.to(tl.int64), count), start, KEYS, WIDTH, False, BULK)
    v = _tile((value, kv_head * value_head, value_step.to(tl.int64), count), start, KEYS, WIDTH, False, BULK)
    key_total = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    value_total = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    scale2 = scale * _LOG2_E
    for repeat in range(REPEATS):
        head = kv_head * REPEATS + repeat
        queries = (query, head * query_head, query_step.to(tl.int64), num_queries)
        slopes = (upstream, head * upstream_head, upstream_step.to(tl.int64), num_queries)
        of_queries = head.to(tl.int64) * num_queries
        s, d = sums + of_queries, deltas + of_queries
        totals = (key_total, value_total)
        if ONE_LOOP:
            totals = _key_gradient_loop(
                totals, k, v, queries, slopes, s, d, low, high, limits, scale2, num_queries,
                QUERIES, WIDTH, _EITHER, PRECISION, BULK,
            )  # fmt: skip
        else:
            a, b = limits[2], limits[3]
            totals = _key_gradient_loop(
                totals, k, v, queries, slopes, s, d, low, a, limits, scale2, num_queries,
                QUERIES, WIDTH, _MASKED, PRECISION, BULK,
            )  # fmt: skip
            totals = _key_gradient_loop(
                totals, k, v, queries, slopes, s, d, a, b, limits, scale2, num_queries,
                QUERIES, WIDTH, _PLAIN, PRECISION, BULK,
            )  # fmt: skip
            totals = _key_gradient_loop(
                totals, k, v, queries, slopes, s, d, b, high, limits, scale2, num_queries,
                QUERIES, WIDTH, _MASKED, PRECISION, BULK,
            )  # fmt: skip
        key_total, value_total = totals
    rows = start + tl.arange(0, KEYS)
    at = rows.to(tl.int64)[:, None] * (kv_heads * WIDTH) + kv_head * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(key_gradient + at, (key_total * scale).to(key_gradient.dtype.element_ty), mask=(rows < count)[:, None])
    tl.store(value_gradient + at, value_total.to(value_gradient.dtype.element_ty), mask=(rows < count)[:, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel about to run."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Put it on the current stream."""
        self.kernel[(self.programs,)](*self.arguments, **self.options)


def _options(width: int, dtype: torch.dtype, tiles: Tiles, bulk: bool) -> dict[str, Any]:
    return {
        "BULK": bulk,
        "WIDTH": width,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "ONE_LOOP": tiles.one_loop,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # of no effect in half precision
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,  # of a score's scaling and its distance from the maximum
    }


def _steps(*tensors: Tensor) -> list[int]:
    """Elements from row to row and from head to head of every tensor."""
    # One row may say anything of its stride, and Triton would compile code of its own for 1.
    return [step for tensor in tensors for step in (tensor.stride(0) if len(tensor) > 1 else 0, tensor.stride(1))]


@functools.cache
def _copies_in_bulk(device: torch.device) -> bool:
    """Whether a device has the copy engine; Triton's interpreter, on the CPU, plays it."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


def _is_matrix(tensor: Tensor) -> bool:
    """Whether the copy engine can fetch tiles of a tensor's heads: they lie side by side, rows at multiples of 16 B."""
    heads_touch = tensor.stride(1) == tensor.shape[2] or tensor.shape[1] == 1
    is_aligned = (tensor.data_ptr() | tensor.stride(0) * tensor.element_size()) % 16 == 0
    return heads_touch and is_aligned and tensor.stride(0) >= tensor.shape[1] * tensor.shape[2]


def _sources(tiles: Tiles, *tensors: tuple[Tensor, int]) -> tuple[list[Any], bool]:
    """What the kernel fetches tiles from: the tensors, or descriptors of them; and whether it is the latter.

    Args:
        tiles: how to cut.
        tensors: each with the rows of its tiles.
    """
    if not (tiles.bulk and all(_is_matrix(tensor) for tensor, _ in tensors) and _copies_in_bulk(tensors[0][0].device)):
        return [tensor for tensor, _ in tensors], False
    descriptors = []
    for tensor, rows in tensors:
        count, heads, width = tensor.shape
        shape, block = [count, heads * width], [rows, width]
        descriptors.append(TensorDescriptor(tensor, shape, [tensor.stride(0), 1], block))
    return descriptors, True


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    output: Tensor,
    sums: Tensor,
    tiles: Tiles,
    documents: Tensor | None = None,
) -> Launch:
    """The forward kernel.

    Args:
        query: [T, H, E]; this and all inputs with any strides but a contiguous last dimension.
        key: [C + T, G, E].
        value: [C + T, G, E].
        first: int32 [T], the first key that each query reads; never decreasing.
        output: contiguous [T, H, E], written.
        sums: float32 [H, T], written: log-sum-exp of each query's scaled scores, natural.
        tiles: how to cut.
        documents: int32 [2, N] begins and ends of tiles of TILE queries, none of two documents; None to cut all
            queries as if they were one.
    """
    num_queries, num_heads, width = query.shape
    numbers = (num_queries, len(key) - num_queries, num_heads, num_heads // key.shape[1], width**-0.5)
    sources, bulk = _sources(tiles, (query, tiles.queries), (key, tiles.keys), (value, tiles.keys))
    count = 0 if documents is None else documents.shape[1]
    arguments = (*sources, first, documents, output, sums, count, *_steps(query, key, value), *numbers)
    options = _options(width, query.dtype, tiles, bulk)
    programs = triton.cdiv(num_queries, tiles.queries) if documents is None else count * (TILE // tiles.queries)
    programs *= num_heads
    return Launch(kernel=_attention_forward, programs=programs, arguments=arguments, options=options)


def query_gradient_launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    upstream: Tensor,
    gradient: Tensor,
    deltas: Tensor,
    tiles: Tiles,
) -> Launch:
    """The kernel of the gradient of the queries.

    Args:
        inputs: query, key, value and first, as in `forward_launch`.
        results: output and sums.
        upstream: [T, H, E], gradient of the output.
        gradient: contiguous [T, H, E], written.
        deltas: float32 [H, T], written: each query's sum of output times upstream; `key_gradient_launch` reads it.
        tiles: how to cut.
    """
    query, key, value, first = inputs
    num_queries, num_heads, width = query.shape
    numbers = (num_queries, len(key) - num_queries, num_heads, num_heads // key.shape[1], width**-0.5)
    read, bulk = _sources(
        tiles, (query, tiles.queries), (key, tiles.keys), (value, tiles.keys), (upstream, tiles.queries)
    )
    tensors = (*read, first, results[0], results[1], deltas, gradient)
    arguments = (*tensors, *_steps(query, key, value, upstream), *numbers)
    options = _options(width, query.dtype, tiles, bulk)
    programs = num_heads * triton.cdiv(num_queries, tiles.queries)
    return Launch(kernel=_attention_query_gradient, programs=programs, arguments=arguments, options=options)


def key_gradient_launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    sums: Tensor,
    upstream: Tensor,
    deltas: Tensor,
    gradients: tuple[Tensor, Tensor],
    tiles: Tiles,
) -> Launch:
    """The kernel of the gradients of keys and values.

    Args:
        inputs: query, key and value as in `forward_launch`, and int32 [C + T] ends: of each key, how many queries
            have a first key not after it.
        sums: of `forward_launch`.
        upstream: [T, H, E], gradient of the output.
        deltas: of `query_gradient_launch`.
        gradients: contiguous [C + T, G, E] of keys and values, written.
        tiles: how to cut.
    """
    query, key, value, ends = inputs
    num_queries, num_heads, width = query.shape
    kv_heads = key.shape[1]
    read, bulk = _sources(
        tiles, (query, tiles.queries), (key, tiles.keys), (value, tiles.keys), (upstream, tiles.queries)
    )
    tensors = (*read, ends, sums, deltas, *gradients)
    numbers = (num_queries, len(key) - num_queries, kv_heads, width**-0.5)
    arguments = (*tensors, *_steps(query, key, value, upstream), *numbers)
    options = _options(width, query.dtype, tiles, bulk) | {"REPEATS": num_heads // kv_heads}
    programs = kv_heads * triton.cdiv(len(key), tiles.keys)
    return Launch(kernel=_attention_key_gradient, programs=programs, arguments=arguments, options=options)


def forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; arguments as in `forward_launch`.

    Returns:
        Output [T, H, E] and log-sum-exps, float32 [H, T].
    """
    output = query.new_empty(query.shape)
    sums = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    if len(query) == 0:
        return output, sums
    tiles = tiles_for(query.shape[-1], query.dtype).forward
    forward_launch(query, key, value, first, output, sums, tiles, documents).run()
    return output, sums


def backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    upstream: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Args:
        inputs: query, key and value.
        bounds: first and ends.
        results: what `forward` returned.
        upstream: [T, H, E], gradient of the output.

    Returns:
        [T, H, E] and twice [C + T, G, E], contiguous.
    """
    query, key, value = inputs
    if len(query) == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in inputs)
    deltas = torch.empty_like(results[1])
    tiles = tiles_for(query.shape[-1], query.dtype)
    read = (query, key, value, bounds[0])
    query_gradient_launch(read, results, upstream, gradients[0], deltas, tiles.query_gradient).run()
    read, written = (query, key, value, bounds[1]), (gradients[1], gradients[2])
    key_gradient_launch(read, results[1], upstream, deltas, written, tiles.key_gradient).run()
    return gradients[0], gradients[1], gradients[2]
