"""The compiled inner loops: one pass over documents at the speed of memory, free of branches on the data.

Work goes word by word, 64 tokens a word:

1. **Fire.** A scheme turns 64 tokens into 64 bits, one for each token that starts a patch, by vector comparisons.
2. **Split.** Where a patch would grow longer than the limit, more bits are set; a word without such a patch, found by a
   few shifts, costs nothing more.
3. **Emit.** The positions of the set bits, packed, minus their left neighbours are the patch lengths: one compression
   and one subtraction for all patches of the word. Processors that cannot compress take eight bits at a time from a
   table.

Entropies arrive as bit patterns, uint16 of float16 or uint32 of float32, and are never converted to be compared:
positive floats sort like integers, so H > θ is one integer comparison with a constant, after one exclusive or where θ
is negative (`thresholds` finds the constants). For float32 the constant lies where rounding to float16 begins to exceed
θ. Differences are taken in float32, and where that cannot decide in float64, which holds the difference of any two
float16 exactly.

The operations on words are in `vectors`. A scheme that compares with a threshold goes from entropies to lengths word by
word; the others find the starts of a few words, then make the lengths.

The loops release the GIL and are single-threaded; `boundaries` runs them on a few Python threads. Numba's own
parallel loops are avoided on purpose: their OpenMP layer aborts a process that forks (as data loaders do), and their
work queue aborts one that calls from two threads.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from blt_patcher.compiling import compiled
from blt_patcher.vectors import (
    WORD,
    ask_ahead,
    emit_lengths,
    exceed,
    flagged,
    leading_zeros,
    not_finite,
    ones,
    rise_above,
    rise_beside,
    rise_exactly,
    space_like,
    trailing_zeros,
)

#: CRC-32 of vectors.py, whose operations the machine code of these kernels contains; see there.
VECTORS_CHECKSUM: Final = 0x28C46968

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
#: Bit patterns of entropies: uint16 of float16 or uint32 of float32.
Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

# Rules by number: a kernel takes a number, so that one compilation serves all schemes.
RULE_ENTROPY: Final = 0
RULE_MONOTONIC: Final = 1
RULE_COMBINED: Final = 2
RULE_SPACE: Final = 3
RULE_FLAGS: Final = 4

#: Tokens a block: what a rule works on at a time, before the lengths are made.
BLOCK: Final = 16 * WORD

#: The kernels read whole words: arrays of data must have at least so many items, and room for lengths as many to spare.
SLACK: Final = WORD

_ALL: Final = np.uint64(2**64 - 1)
_ONE: Final = np.uint64(1)
_ZERO: Final = np.uint64(0)


@compiled
def _split(starts: np.uint64, open_length: int, limit: int, valid: np.uint64) -> np.uint64:
    """Return the starts of a word with more of them, so that no patch is longer than a limit.

    Args:
        starts: the word's bits.
        open_length: tokens since the last start of an earlier word, from 1 to `limit`.
        limit: the longest patch, in tokens.
        valid: which bits may be set.
    """
    # Bits that are within `limit` tokens of a start: of one in the word, or of the last one before it.
    covered = starts
    done, reach = 1, min(limit, WORD)
    while 2 * done <= reach:
        covered |= covered << np.uint64(done)
        done *= 2
    if reach > done:
        covered |= covered << np.uint64(reach - done)
    left = limit - open_length
    covered |= _ALL if left >= WORD else (_ONE << np.uint64(left)) - _ONE
    run = _ALL if limit >= WORD else (_ONE << np.uint64(limit)) - _ONE
    missing = ~covered & valid
    while missing:
        place = np.uint64(trailing_zeros(missing))
        starts |= _ONE << place
        missing &= ~(run << place)
    return starts


@compiled
def _fire_rises(
    bits: Bits, place: int, tokens: int, flip: int, key: int, relative: float, combined: bool, starts: U64
) -> np.uint64:
    """Find where the entropy of the token before exceeds that of the one before it by more than a threshold.

    Args:
        bits: bit patterns of entropies.
        place: index of the entropy that decides on the block's first token, together with the one before.
        tokens: tokens of the block.
        flip: see `patch_range`.
        key: the same.
        relative: the same.
        combined: whether the entropy must exceed a threshold besides.
        starts: uint64 [words], written: a bit for each token; those beyond the block are of no meaning.

    Returns:
        Anything but 0 if one of the entropies is not finite.
    """
    broken = _ZERO
    for word in range(0, tokens, WORD):
        at, shift = _word_place(bits.size, place + word)
        ask_ahead(bits, at)
        before = bits[max(at - 1, 0)]
        rises = rise_above(bits, at, before, np.float32(relative))
        if relative != 0 and rise_beside(bits, at, before, np.float32(relative)):
            rises = rise_exactly(bits, at, before, relative)
        if combined:
            rises &= exceed(bits, at, flip, key)
        starts[word // WORD] = rises >> shift
        broken |= (not_finite(bits, at) >> shift) & _valid(tokens - word)
    return broken


@compiled
def _fire_space(content: U8, place: int, tokens: int, goes_on: bool, starts: U64) -> None:
    """Find where the token before is space-like and the one before that is not.

    Args:
        content: bytes.
        place: index of the byte of the block's first token.
        tokens: tokens of the block.
        goes_on: whether the block is not its document's first.
        starts: as for `_fire_rises`.
    """
    # Whether the two tokens before the block are space-like, in the two highest bits; BOS is.
    spaces = space_like(content, place - WORD) if goes_on else _ALL
    for word in range(0, tokens, WORD):
        at, shift = _word_place(content.size, place + word)
        ask_ahead(content, at)
        last = spaces
        spaces = space_like(content, at) >> shift
        token = (spaces << _ONE) | (last >> np.uint64(63))
        before = (spaces << np.uint64(2)) | (last >> np.uint64(62))
        starts[word // WORD] = token & ~before


@compiled
def _fire_flags(flags: U8, place: int, tokens: int, starts: U64) -> None:
    """Take the starts that somebody else has found; arguments as for `_fire_rises`."""
    for word in range(0, tokens, WORD):
        at, shift = _word_place(flags.size, place + word)
        ask_ahead(flags, at)
        starts[word // WORD] = flagged(flags, at) >> shift


@compiled
def _word_place(size: int, place: int) -> tuple[int, np.uint64]:
    """Return where to read a word of an array from, and how far to shift it down then.

    A whole word from `place` on may pass the array's end; the array's last whole word is read instead.
    """
    at = min(place, size - WORD)
    return at, np.uint64((place - at) & (WORD - 1))


@compiled
def _valid(tokens: int) -> np.uint64:
    """Return the bits of a word of which so many tokens, at least 1, are left."""
    return _ALL >> np.uint64(max(WORD - tokens, 0))


@compiled
def _emit_words(starts: U64, tokens: int, open_length: int, limit: int, out: U16, filled: int) -> tuple[int, int]:
    """Append the lengths of the patches that the starts in a block end; `out` may be empty, to count alone.

    Args:
        starts: uint64 [words] a bit for each token.
        tokens: tokens of the block.
        open_length: tokens since the last start before the block.
        limit: the longest patch, in tokens.
        out: see `patch_range`.
        filled: lengths in `out`.

    Returns:
        How many lengths there are now, and how many tokens there are from the last start on.
    """
    for word in range(0, tokens, WORD):
        found = starts[word // WORD]
        if limit - open_length < WORD:
            found = _split(found, open_length, limit, _valid(tokens - word))
        if out.size:
            emit_lengths(found, open_length, out, filled)
        filled += ones(found)
        open_length = leading_zeros(found) + (1 if found else open_length)
    return filled, open_length


@compiled
def _patch_by_entropy(
    bits: Bits, place: int, tokens: int, flip: int, key: int, limit: int, out: U16, filled: int
) -> int:
    """Patch one document by a threshold, as `_patch_one` does, each word in one go from entropies to lengths."""
    open_length = 1
    broken = _ZERO
    forced = _ONE
    last = (tokens - 1) // WORD
    for word in range(last):
        ask_ahead(bits, place + WORD * word)
        found = exceed(bits, place + WORD * word, flip, key) | forced
        broken |= not_finite(bits, place + WORD * word)
        forced = _ZERO
        if limit - open_length < WORD:
            found = _split(found, open_length, limit, _ALL)
        if out.size:
            emit_lengths(found, open_length, out, filled)
        filled += ones(found)
        open_length = leading_zeros(found) + (1 if found else open_length)
    rest = tokens - WORD * last
    at, shift = _word_place(bits.size, place + WORD * last)
    found = ((exceed(bits, at, flip, key) >> shift) & _valid(rest)) | forced | (_ONE << np.uint64(rest - 1))
    broken |= (not_finite(bits, at) >> shift) & _valid(rest)
    if limit - open_length < WORD:
        found = _split(found, open_length, limit, _valid(rest))
    if out.size:
        emit_lengths(found, open_length, out, filled)
    filled += ones(found)
    return -1 if broken else filled


@compiled
def _patch_one(
    rule: int,
    data: U8,
    bits: Bits,
    place: int,
    tokens: int,
    flip: int,
    key: int,
    relative: float,
    limit: int,
    out: U16,
    filled: int,
    starts: U64,
) -> int:
    """Patch one document of at least one token; return how many lengths there are now, or -1 for a broken entropy.

    Bit p of the document's words stands for token p + 1, so the bits of a word are decided by as many entropies from
    the word's own place on. The last bit stands for the next document's BOS, whose start ends the last patch.
    """
    if rule == RULE_ENTROPY:
        return _patch_by_entropy(bits, place, tokens, flip, key, limit, out, filled)
    open_length = 1
    for first in range(0, tokens, BLOCK):
        count = min(BLOCK, tokens - first)
        broken = _ZERO
        if rule == RULE_SPACE:
            _fire_space(data, place + first, count, first > 0, starts)
        elif rule == RULE_FLAGS:
            _fire_flags(data, place + first, count, starts)
        else:
            broken = _fire_rises(bits, place + first, count, flip, key, relative, rule == RULE_COMBINED, starts)
        if broken:
            return -1
        if first == 0:
            # Token 1 always starts a patch; where rises count, token 2 does too, as nothing has risen before.
            starts[0] |= np.uint64(3) if rule in (RULE_MONOTONIC, RULE_COMBINED) else _ONE
        if first + count == tokens:
            end = (count - 1) // WORD
            rest = count - end * WORD
            starts[end] = (starts[end] & _valid(rest)) | (_ONE << np.uint64(rest - 1))
        filled, open_length = _emit_words(starts, count, open_length, limit, out, filled)
    return filled


@compiled
def patch_range(
    rule: int,
    data: U8,
    data_offsets: I64,
    bits: Bits,
    token_offsets: I64,
    flip: int,
    key: int,
    relative: float,
    limit: int,
    begin: int,
    end: int,
    out: U16,
    counts: I64,
) -> int:
    """Patch the documents begin to end, each by itself.

    Args:
        rule: one of the RULE_ numbers.
        data: space: uint8 all bytes; flags: uint8 [T], by framed token. `SLACK` items at least, if read; so `bits`.
        data_offsets: int64 [D + 1] where each document begins in `data`.
        bits: bit patterns of the entropy after each of the T framed tokens, where the rule reads them.
        token_offsets: int64 [D + 1] where each document's tokens begin in `bits`, from 0 to T.
        flip: entropy and combined: what is XORed with the bit patterns.
        key: and then compared with.
        relative: monotonic and combined: θ_r in nats.
        limit: the longest patch, in tokens, up to 65,535.
        begin: first document.
        end: one past the last document.
        out: uint16, their lengths are written end to end; empty to count alone.
        counts: int64 [D] the number of patches of each document, written; -1 if an entropy is not finite.

    Returns:
        The first document not patched: `end`, or one with an entropy that is not finite, or one that might pass the
        end of `out`, which takes one place per token and `SLACK` more.
    """
    starts = np.empty(BLOCK // WORD, dtype=np.uint64)
    filled = 0
    for d in range(begin, end):
        tokens = token_offsets[d + 1] - token_offsets[d]
        before = filled
        if out.size and filled + tokens + SLACK > out.size:
            return d
        if tokens:
            # A flag is that of the token itself, which bit 0 of the first word is for token 1.
            place = data_offsets[d] + (rule == RULE_FLAGS) if rule >= RULE_SPACE else token_offsets[d]
            filled = _patch_one(rule, data, bits, place, tokens, flip, key, relative, limit, out, filled, starts)
        counts[d] = filled - before if filled >= 0 else -1
        if filled < 0:
            return d
    return end
