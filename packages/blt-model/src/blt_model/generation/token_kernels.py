"""Triton kernels at both ends of a step of one token a row: its embedding, the entropy after it, the likeliest token.

A step of one text may have been launched ahead; see `go_ahead`. Then a kernel of one warp waits for the host's word
while the token is embedded.

As in `kernels`, sums are taken in float32 and in a fixed order, and the module needs triton.

Legend: n rows, V vocabulary, M hash tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_model.generation.go_ahead import GoAhead
from blt_model.generation.kernels import dependence
from blt_model.generation.steps import HashHistory


@triton.jit
def is_skipped(skipped, SKIPS: tl.constexpr):
    """Whether the step that a kernel belongs to is to be skipped, as its first kernel has found."""
    result = False
    if SKIPS:
        result = tl.load(skipped, volatile=True) != 0
    return result


@triton.jit
def _embed(
    tokens, positions, symbols, powers, sizes, table, bytes_table, out, lm_table, lm_out, table_size, offset, dim,
    lm_dim, TABLES: tl.constexpr, ROOM: tl.constexpr, LONGEST: tl.constexpr, HISTORY: tl.constexpr,
    OMIT: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr, LM_BLOCK: tl.constexpr, MOVES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """All of one row: its history moves on by the new token, and the rows of the tables are summed, read at once."""
    back, index = tl.arange(0, HISTORY), tl.arange(0, ROOM)
    inside, present = back < LONGEST, index < TABLES
    # These depend on no other kernel.
    factors = tl.load(
        powers + back[:, None] * TABLES + index[None, :], mask=inside[:, None] & present[None, :], other=0
    )
    if OMIT:
        least = tl.load(sizes + index, mask=present, other=0)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0)
    token = tl.load(tokens + n)
    older = tl.load(symbols + n * LONGEST + back - 1, mask=inside & (back > 0), other=0)
    newest = tl.where(back == 0, token - offset, older)
    hashed = tl.sum(newest[:, None] * factors, 0) % table_size
    hashed = tl.where(hashed < 0, hashed + table_size, hashed)
    if OMIT:
        present = present & (tl.load(positions + n) + 1 >= least)
    columns = tl.arange(0, BLOCK)
    kept = columns < dim
    at = table + (hashed + index * table_size)[:, None] * dim + columns[None, :]
    rows = tl.load(at, mask=present[:, None] & kept[None, :], other=0.0)
    own = tl.load(bytes_table + token * dim + columns, mask=kept, other=0.0)
    if LM_BLOCK > 0:
        lm_columns = tl.arange(0, LM_BLOCK)
        lm_row = tl.load(lm_table + token * lm_dim + lm_columns, mask=lm_columns < lm_dim, other=0.0)
        tl.store(lm_out + n * lm_dim + lm_columns, lm_row, mask=lm_columns < lm_dim)
    total = tl.sum(rows.to(tl.float32), 0) + own.to(tl.float32)
    if AVERAGE:
        total /= 1 + TABLES
    tl.store(out + n * dim + columns, total.to(out.dtype.element_ty), mask=kept)
    if MOVES:
        # Everything was read before anything is overwritten.
        tl.debug_barrier()
        tl.store(symbols + n * LONGEST + back, newest, mask=inside)


def embed(
    tokens: Tensor,
    positions: Tensor,
    hashes: HashHistory,
    byte_table: Tensor,
    *,
    average: bool,
    lm_table: Tensor | None = None,
    moves: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Byte and n-gram embeddings of a new token of each row, which enters the row's history.

    Args:
        tokens: int64 [n].
        positions: int64 [n] in their documents.
        hashes: the history and its tables [M * table_size, dim].
        byte_table: [V, dim].
        average: divide by 1 + M.
        lm_table: [V, dim of another model] the token's row of which is wanted, too; None for none.
        moves: whether the history is moved on, in place.

    Returns:
        [n, dim], and [n, dim of the other model] or None.
    """
    (longest, tables), table = hashes.powers.shape, hashes.weight
    out = torch.empty((len(tokens), table.shape[1]), dtype=table.dtype, device=table.device)
    lm_out = None if lm_table is None else lm_table.new_empty((len(tokens), lm_table.shape[1]))
    _embed[(len(tokens),)](
        tokens,
        positions,
        hashes.symbols,
        hashes.powers,
        hashes.sizes,
        table,
        byte_table,
        out,
        # Pointers that are not read still have to be some.
        out if lm_table is None else lm_table,
        out if lm_out is None else lm_out,
        hashes.config.table_size,
        hashes.offset,
        table.shape[1],
        0 if lm_table is None else lm_table.shape[1],
        TABLES=tables,
        ROOM=triton.next_power_of_2(tables),
        LONGEST=longest,
        HISTORY=triton.next_power_of_2(longest),
        OMIT=hashes.config.omit_partial,
        AVERAGE=average,
        BLOCK=triton.next_power_of_2(table.shape[1]),
        LM_BLOCK=0 if lm_table is None else triton.next_power_of_2(lm_table.shape[1]),
        MOVES=moves,
        **dependence(),
        num_warps=16,
    )
    return out, lm_out


@triton.jit
def _await_word(
    state, words, uniforms, uniform, places, tokens, symbols, offset, ROOM: tl.constexpr, LONGEST: tl.constexpr,
    HISTORY: tl.constexpr, DRAWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One warp."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    # What is read here was written before the kernel ahead of this began. Of the lanes one looks at the host's memory,
    # as each look takes the bus.
    lane = tl.arange(0, 32)
    launch = tl.load(state)
    place = launch % ROOM + lane
    word = tl.sum(tl.load(words + place, mask=lane == 0, other=0, volatile=True), 0)
    while word // 2 != launch + 1:
        word = tl.sum(tl.load(words + place, mask=lane == 0, other=0, volatile=True), 0)
    back = tl.arange(0, HISTORY)
    older = tl.load(symbols + back - 1, mask=(back > 0) & (back < LONGEST), other=0)
    newest = tl.where(back == 0, tl.load(tokens) - offset, older)
    if DRAWS:
        drawn = tl.sum(tl.load(uniforms + place, mask=lane == 0, other=0.0, volatile=True), 0)
    tl.store(state, launch + 1)
    tl.store(state + 1, word % 2)
    if word % 2 == 0:
        tl.store(state + 2, tl.load(places))
        if DEPENDENT:
            # The symbols have been read by then.
            tl.extra.cuda.gdc_wait()
        tl.debug_barrier()
        tl.store(symbols + back, newest, mask=back < LONGEST)
        if DRAWS:
            tl.store(uniform, drawn)


def await_word(go_ahead: GoAhead, places: Tensor, tokens: Tensor, hashes: HashHistory, *, draws: bool) -> None:
    """Wait for the host's word for this launch of one row, and where it goes on, move its history on.

    Args:
        go_ahead: takes note of the word and of the place, for the step's other kernels.
        places: int64 [1] the place.
        tokens: int64 [1] the new token.
        hashes: the history, moved on in place.
        draws: whether the launch's random number is wanted.
    """
    longest = hashes.symbols.shape[1]
    _await_word[(1,)](
        go_ahead.state,
        go_ahead.words,
        go_ahead.uniforms,
        go_ahead.uniform,
        places,
        tokens,
        hashes.symbols,
        hashes.offset,
        ROOM=len(go_ahead.words),
        LONGEST=longest,
        HISTORY=triton.next_power_of_2(longest),
        DRAWS=draws,
        **dependence(),
        num_warps=1,
    )


@triton.jit
def entropy_of(x, inside):
    """Entropy of the distribution of some logits, with minus infinity where there are none."""
    x -= tl.max(x, 0)
    x -= tl.log(tl.sum(tl.exp(x), 0))
    return -tl.sum(tl.where(inside, tl.exp(x) * x, 0.0), 0)


@triton.jit
def likeliest_of(x, v, first, end):
    """The likeliest of tokens v and its log-probability, from logits with minus infinity where there are none."""
    largest = tl.max(x, 0)
    normaliser = largest + tl.log(tl.sum(tl.exp(x - largest), 0))
    allowed = tl.where((v >= first) | (v == end), x, -float("inf"))
    best = tl.max(allowed, 0)
    return tl.argmax(allowed, 0).to(tl.int64), (best - normaliser).to(tl.float64)


@triton.jit
def put_step(
    chosen, log_probability, tokens, counters, cleared, place, result, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    BEFORE: tl.constexpr, CLEARS: tl.constexpr,
):  # fmt: skip
    """Leave what was chosen for the next step and the host."""
    if CLEARS:
        tl.store(cleared, 0)
    to = result + (tl.load(place) - BEFORE) % 2 * 2
    tl.store(tokens, chosen)
    tl.store(to, chosen.to(tl.float64))
    tl.store(to + 1, log_probability)
    n = tl.arange(0, BLOCK)
    tl.store(counters + n, tl.load(counters + n, mask=n < COUNT, other=0) + 1, mask=n < COUNT)


@triton.jit
def _entropy(logits, out, vocabulary, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """Of one row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0)
    v = tl.arange(0, BLOCK)
    inside = v < vocabulary
    x = tl.load(logits + n * vocabulary + v, mask=inside, other=-float("inf")).to(tl.float32)
    tl.store(out + n, entropy_of(x, inside))


def entropy(logits: Tensor, out: Tensor) -> None:
    """Entropy of the next-token distribution.

    Args:
        logits: float32 [n, V], contiguous.
        out: float32, at least [n], to write to, nats; may be pinned memory of the host.
    """
    _entropy[(len(logits),)](
        logits, out, logits.shape[1], BLOCK=triton.next_power_of_2(logits.shape[1]), **dependence(), num_warps=1
    )


@triton.jit
def _likeliest(logits, token, log_probability, vocabulary, first, end, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """One row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0)
    v = tl.arange(0, BLOCK)
    x = tl.load(logits + n * vocabulary + v, mask=v < vocabulary, other=-float("inf")).to(tl.float32)
    best, logarithm = likeliest_of(x, v, first, end)
    tl.store(token + n, best)
    tl.store(log_probability + n, logarithm)


@triton.jit
def _hand_over(
    token, log_probability, tokens, counters, cleared, place, result, skipped, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, BEFORE: tl.constexpr, CLEARS: tl.constexpr, SKIPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The one row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if not is_skipped(skipped, SKIPS):
        chosen, logarithm = tl.load(token), tl.load(log_probability)
        put_step(chosen, logarithm, tokens, counters, cleared, place, result, COUNT, BLOCK, BEFORE, CLEARS)


def hand_over(
    token: Tensor,
    log_probability: Tensor,
    tokens: Tensor,
    counters: Tensor,
    place: Tensor,
    result: Tensor,
    *,
    before: int = 0,
    cleared: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """Leave what a step of one row has found where the next step and the host look for it.

    Args:
        token: int64 [1] the next token.
        log_probability: float64 [1] its own.
        tokens: int64 [1] takes the token.
        counters: int64 [count], contiguous, counted up by one each.
        place: int64 [1] a number whose parity says which half of the result takes token and log-probability; may be
            one of the counters, and is read before they are counted up.
        result: float64 [2, 2], contiguous; may be pinned memory of the host.
        before: to subtract from the place.
        cleared: int64 [1] that is nought afterwards; None for none.
        skipped: int64 [1]; where it is not nought, nothing is left anywhere. None for none.
    """
    _hand_over[(1,)](
        token,
        log_probability,
        tokens,
        counters,
        counters if cleared is None else cleared,
        place,
        result,
        counters if skipped is None else skipped,
        COUNT=counters.numel(),
        BLOCK=triton.next_power_of_2(counters.numel()),
        BEFORE=before,
        CLEARS=cleared is not None,
        SKIPS=skipped is not None,
        **dependence(),
        num_warps=1,
    )


def likeliest(logits: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """The likeliest token of every row among those that may be chosen.

    Args:
        logits: [n, V], contiguous.
        first: tokens from here on may be chosen,
        end: and this one.

    Returns:
        int64 [n] and their log-probabilities among all tokens, float64 [n].
    """
    token = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    log_probability = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    block = triton.next_power_of_2(logits.shape[1])
    _likeliest[(len(logits),)](
        logits, token, log_probability, logits.shape[1], first, end, BLOCK=block, **dependence(), num_warps=1
    )
    return token, log_probability
