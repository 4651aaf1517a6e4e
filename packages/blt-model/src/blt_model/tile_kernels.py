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

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

THREE_LOOPS, ONE_LOOP = 0, 1
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-1e30)
"""Where running maxima begin: a query's first tiles may be masked whole, and -inf - -inf is no number."""
_PLAIN, _MASKED, _EITHER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How a kernel cuts its work."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Tiles of the loop that are under way at once."""
    loops: int = THREE_LOOPS
    """THREE_LOOPS: masked, unmasked, masked; ONE_LOOP: each tile asks whether it needs the mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The tiles of the three kernels."""

    forward: Tiles
    query_gradient: Tiles
    key_gradient: Tiles


HALF = {
    64: Plan(
        forward=Tiles(queries=128, keys=64, warps=4, stages=3),
        query_gradient=Tiles(queries=128, keys=64, warps=8, stages=3),
        key_gradient=Tiles(queries=64, keys=128, warps=8, stages=3),
    ),
    128: Plan(
        forward=Tiles(queries=128, keys=64, warps=8, stages=3),
        query_gradient=Tiles(queries=128, keys=64, warps=8, stages=2),
        key_gradient=Tiles(queries=64, keys=128, warps=8, stages=2),
    ),
    256: Plan(
        forward=Tiles(queries=128, keys=64, warps=8, stages=2),
        query_gradient=Tiles(queries=64, keys=64, warps=8, stages=1),
        key_gradient=Tiles(queries=32, keys=64, warps=8, stages=1),
    ),
}
"""In half precision, by the head width up to which it holds."""
SINGLE = {
    64: Plan(
        forward=Tiles(queries=64, keys=32, warps=4, stages=2),
        query_gradient=Tiles(queries=32, keys=32, warps=4, stages=2),
        key_gradient=Tiles(queries=32, keys=32, warps=4, stages=2),
    ),
    256: Plan(
        forward=Tiles(queries=32, keys=32, warps=4, stages=1),
        query_gradient=Tiles(queries=16, keys=32, warps=4, stages=1),
        key_gradient=Tiles(queries=32, keys=16, warps=4, stages=1),
    ),
}
"""In float32, which goes through no matrix units."""


def tiles_for(width: int, dtype: torch.dtype) -> Plan:
    """The tiles for heads of a width."""
    table = SINGLE if dtype == torch.float32 else HALF
    return next(plan for limit, plan in table.items() if width <= limit)


@triton.jit
def _tile(base, start, step, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Rows `start` on, [ROWS, WIDTH]; zeros from row `count` on, unless the tile is known to be whole."""
    rows = tl.arange(0, ROWS)
    at = base + start * step + rows[:, None] * step + tl.arange(0, WIDTH)[None, :]
    return tl.load(at) if WHOLE else tl.load(at, mask=(start + rows < count)[:, None], other=0.0)


@triton.jit
def _masked(scores, at, low, high, start, plain_low, plain_high, MASK: tl.constexpr):
    """Scores where `low` <= `at` < `high`, -inf elsewhere; a tile between the plain bounds is wanted whole."""
    if MASK == _MASKED:
        scores = tl.where((at >= low) & (at < high), scores, -float("inf"))
    elif MASK == _EITHER:  # noqa: SIM102  # decided by the compiler; the next is decided by the program
        if (start < plain_low) | (start >= plain_high):
            scores = tl.where((at >= low) & (at < high), scores, -float("inf"))
    return scores


@triton.jit
def _forward_loop(
    result, total, highest, q, key, value, key_step, value_step, reach, end, low, high, plain_low, plain_high, count,
    scale, KEYS: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys `low` to `high` for a tile of queries that read `reach` to `end`, the latter not included."""
    for start in range(low, high, KEYS):
        k = _tile(key, start, key_step, count, KEYS, WIDTH, MASK == _PLAIN)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        at = start + tl.arange(0, KEYS)[None, :]
        scores = _masked(scores, at, reach[:, None], end[:, None], start, plain_low, plain_high, MASK)
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 1)
        v = _tile(value, start, value_step, count, KEYS, WIDTH, MASK == _PLAIN)
        result = tl.dot(weights.to(v.dtype), v, result * fade[:, None], input_precision=PRECISION)
        highest = higher
    return result, total, highest


@triton.jit
def _keys_of(first, start, last, carried, KEYS: tl.constexpr):
    """The run of keys of queries `start` to `last`, and in whole tiles from its begin on, its unmasked part."""
    low = tl.load(first + start)
    high = last + carried + 1
    plain_low = low + tl.cdiv(tl.load(first + last) - low, KEYS) * KEYS
    plain_high = low + (start + carried + 1 - low) // KEYS * KEYS
    return low, high, tl.minimum(plain_low, plain_high), plain_high


@triton.jit(do_not_specialize=["num_queries", "carried", "num_heads", "repeats"])
def _attention_forward(
    query, key, value, first, output, sums, query_step, query_head, key_step, key_head, value_step, value_head,
    num_queries, carried, num_heads, repeats, scale, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    LOOPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; heads vary fastest, and late tiles, of long documents, come first."""
    head = tl.program_id(0) % num_heads
    start = (tl.num_programs(0) // num_heads - 1 - tl.program_id(0) // num_heads) * QUERIES
    query_step, key_step, value_step = query_step.to(tl.int64), key_step.to(tl.int64), value_step.to(tl.int64)
    key += head // repeats * key_head
    value += head // repeats * value_head
    count = num_queries + carried
    rows = start + tl.arange(0, QUERIES)
    real = rows < num_queries
    end = rows + carried + 1
    last = tl.minimum(start + QUERIES, num_queries) - 1
    low, high, plain_low, plain_high = _keys_of(first, start, last, carried, KEYS)
    reach = tl.load(first + rows, mask=real, other=0)
    q = _tile(query + head * query_head, start, query_step, num_queries, QUERIES, WIDTH, False)
    result = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    highest = tl.full([QUERIES], _LEAST, dtype=tl.float32)
    scale = scale * _LOG2_E
    if LOOPS == 0:
        result, total, highest = _forward_loop(
            result, total, highest, q, key, value, key_step, value_step, reach, end, low, plain_low, plain_low,
            plain_high, count, scale, KEYS, WIDTH, _MASKED, PRECISION,
        )  # fmt: skip
        result, total, highest = _forward_loop(
            result, total, highest, q, key, value, key_step, value_step, reach, end, plain_low, plain_high, plain_low,
            plain_high, count, scale, KEYS, WIDTH, _PLAIN, PRECISION,
        )  # fmt: skip
        low = plain_high
    result, total, highest = _forward_loop(
        result, total, highest, q, key, value, key_step, value_step, reach, end, low, high, plain_low, plain_high,
        count, scale, KEYS, WIDTH, _MASKED if LOOPS == 0 else _EITHER, PRECISION,
    )  # fmt: skip
    result = result / total[:, None]
    at = rows.to(tl.int64)[:, None] * (num_heads * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(output + at, result.to(output.dtype.element_ty), mask=real[:, None])
    tl.store(sums + head.to(tl.int64) * num_queries + rows, (highest + tl.log2(total)) * _LN_2, mask=real)


@triton.jit
def _query_gradient_loop(
    total, q, g, sum_, delta, key, value, key_step, value_step, reach, end, low, high, plain_low, plain_high, count,
    scale, KEYS: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_forward_loop`, for the gradient of the queries."""
    for start in range(low, high, KEYS):
        k = _tile(key, start, key_step, count, KEYS, WIDTH, MASK == _PLAIN)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - sum_[:, None]
        at = start + tl.arange(0, KEYS)[None, :]
        scores = _masked(scores, at, reach[:, None], end[:, None], start, plain_low, plain_high, MASK)
        weights = tl.exp2(scores)
        v = _tile(value, start, value_step, count, KEYS, WIDTH, MASK == _PLAIN)
        slopes = tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        total = tl.dot((weights * slopes).to(k.dtype), k, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_queries", "carried", "num_heads", "repeats"])
def _attention_query_gradient(
    query, key, value, first, output, upstream, sums, deltas, gradient, query_step, query_head, key_step, key_head,
    value_step, value_head, upstream_step, upstream_head, num_queries, carried, num_heads, repeats, scale,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LOOPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries of one head, and its deltas."""
    head = tl.program_id(0) % num_heads
    start = (tl.num_programs(0) // num_heads - 1 - tl.program_id(0) // num_heads) * QUERIES
    query_step, key_step, value_step = query_step.to(tl.int64), key_step.to(tl.int64), value_step.to(tl.int64)
    key += head // repeats * key_head
    value += head // repeats * value_head
    count = num_queries + carried
    rows = start + tl.arange(0, QUERIES)
    real = rows < num_queries
    end = rows + carried + 1
    last = tl.minimum(start + QUERIES, num_queries) - 1
    low, high, plain_low, plain_high = _keys_of(first, start, last, carried, KEYS)
    reach = tl.load(first + rows, mask=real, other=0)
    at = rows.to(tl.int64)[:, None] * (num_heads * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    o = tl.load(output + at, mask=real[:, None], other=0.0)
    g = _tile(upstream + head * upstream_head, start, upstream_step.to(tl.int64), num_queries, QUERIES, WIDTH, False)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    sums_at = head.to(tl.int64) * num_queries + rows
    tl.store(deltas + sums_at, delta, mask=real)
    sum_ = tl.load(sums + sums_at, mask=real, other=0.0) * _LOG2_E
    q = _tile(query + head * query_head, start, query_step, num_queries, QUERIES, WIDTH, False)
    total = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    scale2 = scale * _LOG2_E
    if LOOPS == 0:
        total = _query_gradient_loop(
            total, q, g, sum_, delta, key, value, key_step, value_step, reach, end, low, plain_low, plain_low,
            plain_high, count, scale2, KEYS, WIDTH, _MASKED, PRECISION,
        )  # fmt: skip
        total = _query_gradient_loop(
            total, q, g, sum_, delta, key, value, key_step, value_step, reach, end, plain_low, plain_high, plain_low,
            plain_high, count, scale2, KEYS, WIDTH, _PLAIN, PRECISION,
        )  # fmt: skip
        low = plain_high
    total = _query_gradient_loop(
        total, q, g, sum_, delta, key, value, key_step, value_step, reach, end, low, high, plain_low, plain_high,
        count, scale2, KEYS, WIDTH, _MASKED if LOOPS == 0 else _EITHER, PRECISION,
    )  # fmt: skip
    tl.store(gradient + at, (total * scale).to(gradient.dtype.element_ty), mask=real[:, None])


@triton.jit
def _key_gradient_loop(
    key_total, value_total, k, v, query, upstream, sums, deltas, query_step, upstream_step, own, end, low, high,
    plain_low, plain_high, count, scale, QUERIES: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries `low` to `high` for a tile of keys that are read by queries `own` to `end`, the latter not included."""
    for start in range(low, high, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        q = _tile(query, start, query_step, count, QUERIES, WIDTH, MASK == _PLAIN)
        g = _tile(upstream, start, upstream_step, count, QUERIES, WIDTH, MASK == _PLAIN)
        if MASK == _PLAIN:
            sum_ = tl.load(sums + rows)
            delta = tl.load(deltas + rows)
        else:
            sum_ = tl.load(sums + rows, mask=rows < count, other=0.0)
            delta = tl.load(deltas + rows, mask=rows < count, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - (sum_ * _LOG2_E)[None, :]
        scores = _masked(scores, rows[None, :], own[:, None], end[:, None], start, plain_low, plain_high, MASK)
        weights = tl.exp2(scores)
        value_total = tl.dot(weights.to(g.dtype), g, value_total, input_precision=PRECISION)
        slopes = tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :]
        key_total = tl.dot((weights * slopes).to(q.dtype), q, key_total, input_precision=PRECISION)
    return key_total, value_total


@triton.jit(do_not_specialize=["num_queries", "carried", "kv_heads"])
def _attention_key_gradient(
    query, key, value, ends, upstream, sums, deltas, key_gradient, value_gradient, query_step, query_head, key_step,
    key_head, value_step, value_head, upstream_step, upstream_head, num_queries, carried, kv_heads, scale,
    REPEATS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LOOPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one head; early keys, of long documents, come first."""
    kv_head = tl.program_id(0) % kv_heads
    start = tl.program_id(0) // kv_heads * KEYS
    query_step, upstream_step = query_step.to(tl.int64), upstream_step.to(tl.int64)
    count = num_queries + carried
    columns = start + tl.arange(0, KEYS)
    real = columns < count
    own = columns - carried
    end = tl.load(ends + columns, mask=real, other=0)
    last = tl.minimum(start + KEYS, count) - 1
    low = tl.maximum(start - carried, 0)
    high = tl.load(ends + last)
    plain_high = low + tl.maximum(tl.load(ends + start) - low, 0) // QUERIES * QUERIES
    plain_low = tl.minimum(low + tl.cdiv(tl.maximum(last - carried - low, 0), QUERIES) * QUERIES, plain_high)
    k = _tile(key + kv_head * key_head, start, key_step.to(tl.int64), count, KEYS, WIDTH, False)
    v = _tile(value + kv_head * value_head, start, value_step.to(tl.int64), count, KEYS, WIDTH, False)
    key_total = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    value_total = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    scale2 = scale * _LOG2_E
    for repeat in range(REPEATS):
        head = kv_head * REPEATS + repeat
        q = query + head * query_head
        g = upstream + head * upstream_head
        row_sums = sums + head.to(tl.int64) * num_queries
        row_deltas = deltas + head.to(tl.int64) * num_queries
        begin = low
        if LOOPS == 0:
            key_total, value_total = _key_gradient_loop(
                key_total, value_total, k, v, q, g, row_sums, row_deltas, query_step, upstream_step, own, end, low,
                plain_low, plain_low, plain_high, num_queries, scale2, QUERIES, WIDTH, _MASKED, PRECISION,
            )  # fmt: skip
            key_total, value_total = _key_gradient_loop(
                key_total, value_total, k, v, q, g, row_sums, row_deltas, query_step, upstream_step, own, end,
                plain_low, plain_high, plain_low, plain_high, num_queries, scale2, QUERIES, WIDTH, _PLAIN, PRECISION,
            )  # fmt: skip
            begin = plain_high
        key_total, value_total = _key_gradient_loop(
            key_total, value_total, k, v, q, g, row_sums, row_deltas, query_step, upstream_step, own, end, begin, high,
            plain_low, plain_high, num_queries, scale2, QUERIES, WIDTH, _MASKED if LOOPS == 0 else _EITHER, PRECISION,
        )  # fmt: skip
    at = columns.to(tl.int64)[:, None] * (kv_heads * WIDTH) + kv_head * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(key_gradient + at, (key_total * scale).to(key_gradient.dtype.element_ty), mask=real[:, None])
    tl.store(value_gradient + at, value_total.to(value_gradient.dtype.element_ty), mask=real[:, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel about to run."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Put it on the current stream."""
        if self.programs:
            self.kernel[(self.programs,)](*self.arguments, **self.options)


def _options(width: int, dtype: torch.dtype, tiles: Tiles) -> dict[str, Any]:
    return {
        "WIDTH": width,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "LOOPS": tiles.loops,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # of no effect in half precision
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _steps(*tensors: Tensor) -> list[int]:
    """Elements from row to row and from head to head of every tensor."""
    # One row may say anything of its stride, and Triton would compile code of its own for 1.
    return [step for tensor in tensors for step in (tensor.stride(0) if len(tensor) > 1 else 0, tensor.stride(1))]


def forward_launch(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, output: Tensor, sums: Tensor, tiles: Tiles
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
    """
    num_queries, num_heads, width = query.shape
    numbers = (num_queries, len(key) - num_queries, num_heads, num_heads // key.shape[1], width**-0.5)
    arguments = (query, key, value, first, output, sums, *_steps(query, key, value), *numbers)
    options = _options(width, query.dtype, tiles)
    programs = num_heads * triton.cdiv(num_queries, tiles.queries)
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
    tensors = (query, key, value, first, results[0], upstream, results[1], deltas, gradient)
    arguments = (*tensors, *_steps(query, key, value, upstream), *numbers)
    options = _options(width, query.dtype, tiles)
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
    tensors = (query, key, value, ends, upstream, sums, deltas, *gradients)
    numbers = (num_queries, len(key) - num_queries, kv_heads, width**-0.5)
    arguments = (*tensors, *_steps(query, key, value, upstream), *numbers)
    options = _options(width, query.dtype, tiles) | {"REPEATS": num_heads // kv_heads}
    programs = kv_heads * triton.cdiv(len(key), tiles.keys)
    return Launch(kernel=_attention_key_gradient, programs=programs, arguments=arguments, options=options)


def forward(query: Tensor, key: Tensor, value: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Attend; arguments as in `forward_launch`.

    Returns:
        Output [T, H, E] and log-sum-exps, float32 [H, T].
    """
    output = query.new_empty(query.shape)
    sums = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    tiles = tiles_for(query.shape[-1], query.dtype).forward
    forward_launch(query, key, value, first, output, sums, tiles).run()
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
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in inputs)
    deltas = torch.empty_like(results[1])
    tiles = tiles_for(query.shape[-1], query.dtype)
    read = (query, key, value, bounds[0])
    query_gradient_launch(read, results, upstream, gradients[0], deltas, tiles.query_gradient).run()
    read, written = (query, key, value, bounds[1]), (gradients[1], gradients[2])
    key_gradient_launch(read, results[1], upstream, deltas, written, tiles.key_gradient).run()
    return gradients[0], gradients[1], gradients[2]
