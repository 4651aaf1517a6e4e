"""The compiled inner loops: one pass over documents, free of branches on the data.

Entropies arrive as the uint16 bit patterns of float16, which Numba cannot compute with. They need no conversion:

- an order comparison with a threshold is one integer comparison, because the bit patterns of float16, negative ones
  flipped, sort like the numbers (`order_key`);
- a difference is exact in 64-bit integers, because every finite float16 is a whole number of units of 2⁻²⁴
  (`_fixed_point`), so `H' − H > θ_r` is an integer comparison with floor(θ_r · 2²⁴).

Work goes block by block: a vectorised loop marks the tokens that start a patch, a loop without branches collects
their positions, and a loop over the (four to eight times fewer) patches turns positions into lengths and splits the
long ones. Blocks are small enough to stay in the first-level cache.

The loops release the GIL and are single-threaded; `boundaries` runs them on a few Python threads. Numba's own
parallel loops are avoided on purpose: their OpenMP layer aborts a process that forks (as data loaders do), and their
work queue aborts one that calls from two threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]

# Rules by number: a kernel takes a number, so that one compilation serves all schemes.
RULE_ENTROPY: Final = 0
RULE_MONOTONIC: Final = 1
RULE_COMBINED: Final = 2
RULE_SPACE: Final = 3
RULE_STATIC: Final = 4
RULE_BYTE: Final = 5

#: Tokens a block: marks, positions and the entropies read take 4 + 1 + 2 bytes each, 28 kB together.
BLOCK: Final = 4096

#: float16 values are whole multiples of 2 to the power of minus this.
FIXED_POINT_BITS: Final = 24


def compiled(function: F) -> F:
    """Compile with Numba, keeping the machine code on disk where some directory lets us.

    Numba looks for a place when a function is decorated and raises where there is none (an installation that is
    read-only, for a user without a writable home); importing the package must not fail for that, so the function is
    then compiled anew in each process.
    """
    try:
        kernel = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        log.debug("no writable directory for Numba's cache: %s is compiled in every process", function.__name__)
        kernel = numba.njit(nogil=True)(function)
    return cast(F, kernel)


@compiled
def _mark_entropy(previous: U16, key: int, marks: U8) -> None:
    """Mark a token where the entropy after the token before it exceeds the threshold.

    Args:
        previous: uint16 [C] float16 bit patterns, the entropy after the token before each of the block's.
        key: `order_key` of the largest float16 not above the threshold.
        marks: uint8 [C or more], written.
    """
    limit = np.int16(key)
    for i in range(previous.size):
        s = np.int16(previous[i])
        # Negative numbers' patterns sort backwards: flip all but the sign.
        order = np.int16(s ^ np.int16((s >> np.int16(15)) & np.int16(0x7FFF)))
        marks[i] = np.uint8(order > limit)


@compiled
def _all_finite(bits: U16) -> bool:
    """Return whether no float16 bit pattern is an infinity or a NaN."""
    worst = np.uint16(0)
    for i in range(bits.size):
        worst = max(worst, np.uint16(bits[i] & np.uint16(0x7FFF)))
    return bool(worst < 0x7C00)


@compiled
def _fixed_point(b: np.int64) -> np.int64:
    """Return a finite float16, given as its bit pattern, in units of 2⁻²⁴: exact, at most 2⁴⁰ in magnitude."""
    exponent = (b >> 10) & 31
    normal = np.int64(exponent > 0)
    magnitude = ((b & 0x3FF) | (normal << 10)) << (exponent - normal)
    sign = -((b >> 15) & 1)
    return (magnitude ^ sign) - sign


@compiled
def _mark_rises(last: U16, previous: U16, threshold: int, relative: int, marks: U8) -> None:
    """Mark a token where the entropy before it exceeds one limit and has risen by more than another.

    Args:
        last: uint16 [C] float16 bit patterns, the entropy two tokens before each of the block's.
        previous: uint16 [C] the same, one token before.
        threshold: θ in units of 2⁻²⁴, rounded down; the least int64 where the rule has none.
        relative: θ_r in units of 2⁻²⁴, rounded down.
        marks: uint8 [C or more], written.
    """
    for i in range(previous.size):
        now = _fixed_point(np.int64(previous[i]))
        before = _fixed_point(np.int64(last[i]))
        marks[i] = np.uint8((now > threshold) & (now - before > relative))


@compiled
def _is_space_like(byte: np.uint8) -> np.uint8:
    """Return 1 unless a byte is an ASCII letter or digit or a UTF-8 continuation byte; all in eight bits."""
    letter = np.uint8((byte | np.uint8(0x20)) - np.uint8(0x61))
    digit = np.uint8(byte - np.uint8(0x30))
    return np.uint8((letter >= 26) & (digit >= 10) & ((byte & 0xC0) != 0x80))


@compiled
def _mark_space(last: U8, previous: U8, marks: U8) -> None:
    """Mark a token where the byte before it is space-like and the one before that is not.

    Args:
        last: uint8 [C] the byte two tokens before each of the block's.
        previous: uint8 [C] the byte one token before.
        marks: uint8 [C or more], written.
    """
    for i in range(previous.size):
        marks[i] = _is_space_like(previous[i]) & (np.uint8(1) - _is_space_like(last[i]))


@compiled
def _mark_block(rule: int, data: U8, bits: U16, first: int, count: int, p: int, q: int, marks: U8) -> None:
    """Mark those of the tokens first to first + count that start a patch; see `patch_range` for the rest."""
    # Slices, not offsets inside the loops: an index that might be negative keeps a loop from being vectorised.
    end = first + count
    if rule == RULE_ENTROPY:
        _mark_entropy(bits[first - 1 : end - 1], p, marks)
    elif rule in (RULE_MONOTONIC, RULE_COMBINED):
        _mark_rises(bits[first - 2 : end - 2], bits[first - 1 : end - 1], p, q, marks)
    elif rule == RULE_SPACE:
        # Token j is byte j - 1.
        _mark_space(data[first - 3 : end - 3], data[first - 2 : end - 2], marks)
    elif rule == RULE_STATIC:
        # Starts are the tokens 1 + n·p.
        marks[:count] = np.uint8(0)
        marks[(1 - first) % p : count : p] = np.uint8(1)
    else:
        marks[:count] = np.uint8(1)


@compiled
def _emit(length: int, limit: int, out: U16, filled: int) -> int:
    """Append one patch, split into pieces of at most `limit`; return how many lengths there are now."""
    while length > limit:
        out[filled] = np.uint16(limit)
        filled += 1
        length -= limit
    out[filled] = np.uint16(length)
    return filled + 1


@compiled
def _patch_one(rule: int, data: U8, bits: U16, p: int, q: int, limit: int, out: U16, marks: U8, starts: I64) -> int:
    """Patch one document.

    Returns:
        The number of patches written to `out`, or -1 if an entropy is not finite.
    """
    if not _all_finite(bits):
        return -1
    tokens = data.size + 2
    out[0] = np.uint16(1)
    filled = 1
    start = 1
    # Tokens below this one start by decree: 0, 1 and, in the rules that look two tokens back, 2 (or never 2).
    first = 2
    if rule in (RULE_MONOTONIC, RULE_COMBINED):
        if tokens > 2:
            filled = _emit(1, limit, out, filled)
            start = 2
        first = 3
    elif rule == RULE_SPACE:
        first = 3
    while first < tokens:
        count = min(BLOCK, tokens - first)
        _mark_block(rule, data, bits, first, count, p, q, marks)
        found = 0
        for i in range(count):
            # Always written, kept only where the mark moves the end on: no branch to predict.
            starts[found] = first + i
            found += marks[i]
        for k in range(found):
            filled = _emit(starts[k] - start, limit, out, filled)
            start = starts[k]
        first += count
    return _emit(tokens - start, limit, out, filled)


@compiled
def patch_range(
    rule: int,
    content: U8,
    content_offsets: I64,
    bits: U16,
    p: int,
    q: int,
    limit: int,
    begin: int,
    end: int,
    out: U16,
    counts: I64,
) -> int:
    """Patch the documents begin to end, each by itself.

    Args:
        rule: one of the RULE_ numbers.
        content: uint8 [N] all documents' bytes.
        content_offsets: int64 [D + 1] where each document's bytes begin in `content`.
        bits: uint16 [N + 2D] float16 bit patterns after each framed token; anything where the rule reads none.
        p: entropy: the threshold's key; monotonic and combined: θ in fixed point; static: the patch length.
        q: monotonic and combined: θ_r in fixed point.
        limit: the longest patch, in tokens.
        begin: first document.
        end: one past the last document.
        out: uint16 with room for one length per token of these documents; their lengths are written end to end.
        counts: int64 [D] the number of patches of each document, written.

    Returns:
        -1, or the first document found to have an entropy that is not finite.
    """
    marks = np.empty(BLOCK, dtype=np.uint8)
    starts = np.empty(BLOCK, dtype=np.int64)
    needs_entropies = rule <= RULE_COMBINED
    filled = 0
    for d in range(begin, end):
        low, high = content_offsets[d], content_offsets[d + 1]
        token = low - content_offsets[0] + 2 * d
        tokens = high - low + 2
        document_bits = bits[token : token + tokens] if needs_entropies else bits[:0]
        counts[d] = _patch_one(
            rule, content[low:high], document_bits, p, q, limit, out[filled : filled + tokens], marks, starts
        )
        if counts[d] < 0:
            return d
        filled += counts[d]
    return -1


@compiled
def frame_span(
    content: U8,
    content_offsets: I64,
    token_offsets: I64,
    document: int,
    low: int,
    tokens: I64,
    bos: int,
    eos: int,
    byte_offset: int,
) -> None:
    """Write the framed tokens low to low + T of documents laid end to end.

    Args:
        content: uint8 [N] all documents' bytes.
        content_offsets: int64 [D + 1] where each document's bytes begin in `content`.
        token_offsets: int64 [D + 1] where each document's framed tokens begin, from 0.
        document: the document that holds token `low`.
        low: first token to write.
        tokens: int64 [T] token ids, written.
        bos: id of BOS.
        eos: id of EOS.
        byte_offset: what is added to a byte.
    """
    done = 0
    while done < tokens.size:
        start, end = token_offsets[document], token_offsets[document + 1]
        here = low + done
        if here == start:
            tokens[done] = bos
            done += 1
            here += 1
        count = min(tokens.size - done, end - 1 - here)
        if count > 0:
            source = content_offsets[document] + here - start - 1
            piece = content[source : source + count]
            target = tokens[done : done + count]
            for i in range(piece.size):
                target[i] = piece[i] + byte_offset
            done += count
        if done < tokens.size:
            tokens[done] = eos
            done += 1
        document += 1
