"""Triton kernels for both ends of a training step: the rows of hash embeddings, and the loss with its gradient.

Torch takes dozens of passes over memory for each; these take one. To torch they are operations with fake
implementations, so that their shapes are known where nothing is computed. This module needs triton; import it only for
tensors on CUDA (or under Triton's interpreter).

Legend: T tokens, M tables, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _ROWS = 256, 4


@triton.jit(do_not_specialize=["length"])
def _hash(
    tokens, positions, rows, length, table_size, SIZES: tl.constexpr, COUNT: tl.constexpr, PRIME: tl.constexpr,
    FIRST: tl.constexpr, TABLES: tl.constexpr, OFFSET: tl.constexpr, NEWEST_FIRST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens' rows in all tables of one hash function, of which FIRST is the first; SIZES has a byte for each."""
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = place < length
    position = tl.load(positions + place, mask=inside, other=0)
    for index in tl.static_range(COUNT):
        total = tl.zeros([TOKENS], dtype=tl.int64)
        for step in tl.static_range((SIZES >> (8 * index)) & 255):
            # The symbol that counts least comes last.
            back = step if not NEWEST_FIRST else ((SIZES >> (8 * index)) & 255) - 1 - step
            reached = inside & (position >= back)
            symbol = tl.load(tokens + place - back, mask=reached, other=OFFSET) - OFFSET
            total = total * PRIME + symbol
        row = total % table_size
        row = tl.where(row < 0, row + table_size, row)
        column = FIRST + index
        tl.store(rows + place.to(tl.int64) * TABLES + column, row + column * table_size, mask=inside)


@torch.library.custom_op(
    "blt_model::hash_rows",
    mutates_args=(),
    schema="(Tensor tokens, Tensor positions, *, int[] sizes, int[] primes, int table_size, int offset, "
    "bool newest_first) -> Tensor",
)
def hash_rows(
    tokens: Tensor,
    positions: Tensor,
    *,
    sizes: Sequence[int],
    primes: Sequence[int],
    table_size: int,
    offset: int,
    newest_first: bool,
) -> Tensor:
    """Rows of hash embeddings.

    Args:
        tokens: int64 [T] ids.
        positions: int64 [T], the place of each token in its document.
        sizes: of the n-grams.
        primes: of the hash functions.
        table_size: rows of a table.
        offset: taken from a token to give its symbol.
        newest_first: whether the newest symbol counts prime ** 0, and not the oldest.

    Returns:
        int64 [T, M], function by function.
    """
    tables = len(sizes) * len(primes)
    rows = torch.empty((len(tokens), tables), dtype=torch.int64, device=tokens.device)
    for function, prime in enumerate(primes):
        if not len(tokens):
            break
        _hash[(triton.cdiv(len(tokens), _TOKENS),)](
            tokens.contiguous(),
            positions.contiguous(),
            rows,
            len(tokens),
            table_size,
            SIZES=sum(size << (8 * index) for index, size in enumerate(sizes)),
            COUNT=len(sizes),
            PRIME=prime,
            FIRST=function * len(sizes),
            TABLES=tables,
            OFFSET=offset,
            NEWEST_FIRST=newest_first,
            TOKENS=_TOKENS,
            num_warps=4,
        )
    return rows


@hash_rows.register_fake
def _(tokens: Tensor, positions: Tensor, *, sizes: Sequence[int], primes: Sequence[int], **_: object) -> Tensor:
    return positions.new_empty((tokens.shape[0], len(sizes) * len(primes)), dtype=torch.int64)


@triton.jit(do_not_specialize=["length"])
def _cross_entropy(
    logits, targets, losses, penalties, gradient, length, z_loss, ignored, VOCABULARY: tl.constexpr,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The losses of some tokens, and the gradient of their sum."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)[None, :]
    target = tl.load(targets + rows, mask=rows < length, other=ignored)
    kept = target != ignored
    inside = (rows < length)[:, None] & (columns < VOCABULARY)
    at = rows.to(tl.int64)[:, None] * VOCABULARY + columns
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    # Rows past the end hold nothing but -inf.
    x = tl.where((rows < length)[:, None], x, 0.0)
    highest = tl.max(x, 1)
    weights = tl.exp(x - highest[:, None])
    total = tl.sum(weights, 1)
    normaliser = highest + tl.log(total)
    is_target = columns == target[:, None]
    loss = normaliser - tl.sum(tl.where(is_target, x, 0.0), 1)
    tl.store(losses + rows, tl.where(kept, loss, 0.0), mask=rows < length)
    tl.store(penalties + rows, tl.where(kept, z_loss * normaliser * normaliser, 0.0), mask=rows < length)
    if GRADIENT:
        share = (1 + 2 * z_loss * normaliser) / total
        slope = weights * share[:, None] - tl.where(is_target, 1.0, 0.0)
        slope = tl.where(kept[:, None], slope, 0.0)
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)


@torch.library.custom_op(
    "blt_model::cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, float z_loss, int ignored, *, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor)",
)
def cross_entropy(
    logits: Tensor, targets: Tensor, z_loss: float, ignored: int, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all tokens.

    Args:
        logits: [T, V] of float16, bfloat16 or float32.
        targets: int64 [T].
        z_loss: weight of the squared log of the softmax's normaliser.
        ignored: the target that counts nothing.
        with_gradient: whether to make the gradient.

    Returns:
        float32 [T] of -log p(target), float32 [T] of what the normaliser adds, and the gradient of the sum of both in
        the logits' dtype: [T, V], or [0, V] where none is made.
    """
    length, vocabulary = logits.shape
    logits = logits.contiguous()
    losses, penalties, gradient = _results(logits, with_gradient=with_gradient)
    if length:
        _cross_entropy[(triton.cdiv(length, _ROWS),)](
            logits,
            targets.contiguous(),
            losses,
            penalties,
            gradient,
            length,
            z_loss,
            ignored,
            VOCABULARY=vocabulary,
            GRADIENT=with_gradient,
            ROWS=_ROWS,
            WIDE=triton.next_power_of_2(vocabulary),
            num_warps=4,
        )
    return losses, penalties, gradient


def _results(logits: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `cross_entropy` fills."""
    length, vocabulary = logits.shape
    losses, penalties = (logits.new_empty(length, dtype=torch.float32) for _ in range(2))
    return losses, penalties, logits.new_empty((length if with_gradient else 0, vocabulary))


@cross_entropy.register_fake
def _(
    logits: Tensor, targets: Tensor, z_loss: float, ignored: int, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(logits, with_gradient=with_gradient)
