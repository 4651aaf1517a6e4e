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

The vectors are written in LLVM's own language (Numba's `intrinsic`), which compiles them for any processor. They must
stay in this file: Numba's cache on disk knows of changes in the file of a kernel alone.

The loops release the GIL and are single-threaded; `boundaries` runs them on a few Python threads. Numba's own
parallel loops are avoided on purpose: their OpenMP layer aborts a process that forks (as data loaders do), and their
work queue aborts one that calls from two threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from blt_patcher.compiling import can_compress, compiled

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

# Rules by number, so that one compilation serves all schemes.
RULE_ENTROPY: Final = 0
RULE_MONOTONIC: Final = 1
RULE_COMBINED: Final = 2
RULE_SPACE: Final = 3
RULE_FLAGS: Final = 4

#: Tokens a word.
WORD: Final = 64
#: Tokens a block: what one rule works on at a time, before the lengths are made.
BLOCK: Final = 16 * WORD
#: The kernels read whole words: arrays of data must have at least so many items, and room for lengths as many to spare.
SLACK: Final = WORD
#: Bytes ahead of the word at work that are asked of memory; processors do not look across a page (4 kB) by themselves.
_AHEAD: Final = 8192

#: float32 values of this magnitude and more round to an infinity in float16.
FLOAT16_OVERFLOW: Final = 65520.0

_ALL: Final = np.uint64(2**64 - 1)
_ONE: Final = np.uint64(1)
_ZERO: Final = np.uint64(0)


#: Whether lengths are made by vector compression rather than from the table.
COMPRESSES: Final = can_compress()


def _kernel_part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let kernels call what a function writes in LLVM's language."""
    return cast(Callable[..., Any], intrinsic(function))


def _vector(lane: ir.Type, value: float | list[int], lanes: int = WORD) -> ir.Constant:
    """Return a constant vector: one value in every lane, or a list of them."""
    return ir.Constant(ir.VectorType(lane, lanes), value if isinstance(value, list) else [value] * lanes)


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int = WORD) -> ir.Value:
    """Return a vector with a value in every lane."""
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, empty, _vector(ir.IntType(32), 0, lanes))


def _address(context: Any, builder: ir.IRBuilder, kind: types.Array, array: ir.Value, index: ir.Value) -> ir.Value:
    """Return the address of an array's item; the array is C-contiguous, and the index is not checked."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(context: Any, builder: ir.IRBuilder, kind: types.Array, array: ir.Value, index: ir.Value) -> ir.Value:
    """Load a word of an array's items."""
    vector = ir.VectorType(ir.IntType(_width(kind)), WORD)
    address = builder.bitcast(_address(context, builder, kind, array, index), vector.as_pointer())
    return builder.load(address, align=_width(kind) // 8)


def _width(kind: types.Array) -> int:
    """Return the bits of an array's item."""
    return int(cast(Any, kind.dtype).bitwidth)


@_kernel_part
def _ask_ahead(typing_context: Any, array: Any, at: Any) -> Any:
    """Ask memory for the word that lies some words after the one at `at`; beyond the array nothing happens."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        byte, int32, int64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        name = "llvm.prefetch.p0" if llvm.llvm_version_info[0] >= 17 else "llvm.prefetch.p0i8"
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), int32, int32, int32])
        prefetch = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        place = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        place = builder.bitcast(place, byte.as_pointer())
        for line in range(0, WORD * _width(signature.args[0]) // 8, 64):
            ahead = builder.gep(place, [ir.Constant(int64, _AHEAD + line)])
            # To read, to be kept, data rather than code.
            builder.call(prefetch, [ahead, ir.Constant(int32, 0), ir.Constant(int32, 3), ir.Constant(int32, 1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def _as_float32(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Return the float16 numbers that bit patterns stand for, rounding those of float32, as a vector of float32.

    Only integer arithmetic and exact float32 arithmetic, as not every processor knows float16.
    """
    lanes = bits.type.count
    int32, real = ir.IntType(32), ir.VectorType(ir.FloatType(), lanes)

    def constant(value: int) -> ir.Constant:
        return _vector(int32, value, lanes)

    def number(value: float) -> ir.Constant:
        return _vector(ir.FloatType(), value, lanes)

    if bits.type.element.width == 16:
        wide = builder.zext(bits, ir.VectorType(int32, lanes))
        sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
        magnitude = builder.shl(builder.and_(wide, constant(0x7FFF)), constant(13))
        is_small = builder.icmp_unsigned("<", magnitude, constant(0x0400 << 13))
        normal = builder.add(magnitude, constant((127 - 15) << 23))
        # A subnormal's digits after an implicit one, less that one.
        shifted = builder.bitcast(builder.add(magnitude, constant((127 - 14) << 23)), real)
        small = builder.fsub(shifted, number(2.0**-14))
    else:
        sign = builder.and_(bits, constant(-0x80000000))
        magnitude = builder.and_(bits, constant(0x7FFFFFFF))
        is_small = builder.icmp_unsigned("<", magnitude, constant((127 - 14) << 23))
        # To the nearest multiple of the last digit kept, ties to even.
        odd = builder.and_(builder.lshr(magnitude, constant(13)), constant(1))
        normal = builder.and_(builder.add(builder.add(magnitude, odd), constant(0x0FFF)), constant(-0x2000))
        # Numbers from 0.5 to 1 have steps of 2⁻²⁴, as the least of float16 have.
        small = builder.fsub(builder.fadd(builder.bitcast(magnitude, real), number(0.5)), number(0.5))
    chosen = builder.select(is_small, builder.bitcast(small, normal.type), normal)
    return builder.bitcast(builder.or_(chosen, sign), real)


@_kernel_part
def _exceed(typing_context: Any, bits: Any, at: Any, flip: Any, key: Any) -> Any:
    """Return as uint64 which of the 64 items from `at` on, XOR `flip`, are above `key` as signed integers."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word = _load(context, builder, signature.args[0], arguments[0], arguments[1])
        lane = word.type.element
        flips, keys = (_splat(builder, builder.trunc(argument, lane)) for argument in arguments[2:])
        above = builder.icmp_signed(">", builder.xor(word, flips), keys)
        return builder.bitcast(above, ir.IntType(64))

    return types.uint64(bits, types.int64, types.int64, types.int64), generate


@_kernel_part
def _not_finite(typing_context: Any, bits: Any, at: Any) -> Any:
    """Return as uint64 which of the 64 entropies from `at` on are no finite numbers as float16."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word = _load(context, builder, signature.args[0], arguments[0], arguments[1])
        half = word.type.element.width == 16
        least = 0x7C00 if half else int(np.float32(FLOAT16_OVERFLOW).view(np.uint32))
        magnitude = builder.and_(word, _vector(word.type.element, 0x7FFF if half else 0x7FFFFFFF))
        broken = builder.icmp_unsigned(">=", magnitude, _vector(word.type.element, least))
        return builder.bitcast(broken, ir.IntType(64))

    return types.uint64(bits, types.int64), generate


def _beside_last(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> tuple[ir.Value, ir.Value]:
    """Return 64 entropies as float32, and the one before each; the arguments are those of `_rise_part`."""
    now = _as_float32(builder, _load(context, builder, signature.args[0], arguments[0], arguments[1]))
    lead = _as_float32(builder, _splat(builder, arguments[2], 1))
    zero = ir.Constant(ir.IntType(32), 0)
    last = builder.shuffle_vector(now, now, _vector(ir.IntType(32), [0, *range(WORD - 1)]))
    return now, builder.insert_element(last, builder.extract_element(lead, zero), zero)


def _rise_part(real: type[ir.Type], relation: str) -> Callable[..., Any]:
    """Return what compares 64 rises with a threshold, in float32 or float64.

    It takes the bit patterns, where the 64 begin, the pattern before them, and the threshold, of that type; it returns
    a bit for each as uint64.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        sides = _beside_last(context, builder, signature, arguments)
        if real is ir.DoubleType:
            sides = tuple(builder.fpext(side, ir.VectorType(real(), WORD)) for side in sides)
        found = builder.fcmp_ordered(relation, builder.fsub(*sides), _splat(builder, arguments[3]))
        return builder.bitcast(found, ir.IntType(64))

    number = types.float64 if real is ir.DoubleType else types.float32

    @_kernel_part
    def part(typing_context: Any, bits: Any, at: Any, before: Any, relative: Any) -> Any:
        return types.uint64(bits, types.int64, bits.dtype, number), generate

    return part


# float32 rounds a rise, but keeps the order: only a rise that equals the rounded threshold is undecided.
_rise_above = _rise_part(ir.FloatType, ">")
_rise_beside = _rise_part(ir.FloatType, "==")
_rise_exactly = _rise_part(ir.DoubleType, ">")


@_kernel_part
def _space_like(typing_context: Any, content: Any, at: Any) -> Any:
    """Return as uint64 which of the 64 bytes from `at` on are no ASCII letter, digit or UTF-8 continuation byte."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word = _load(context, builder, signature.args[0], arguments[0], arguments[1])

        def constant(value: int) -> ir.Constant:
            return _vector(ir.IntType(8), value)

        # Unsigned, what lies below a range's first wraps round to above its last.
        letter = builder.sub(builder.or_(word, constant(0x20)), constant(0x61))
        digit = builder.sub(word, constant(0x30))
        no_letter = builder.icmp_unsigned(">=", letter, constant(26))
        no_digit = builder.icmp_unsigned(">=", digit, constant(10))
        # Continuation bytes, 0x80 to 0xBF, are the least of the signed bytes.
        no_continuation = builder.icmp_signed(">=", word, constant(-64))
        return builder.bitcast(builder.and_(builder.and_(no_letter, no_digit), no_continuation), ir.IntType(64))

    return types.uint64(content, types.int64), generate


@_kernel_part
def _flagged(typing_context: Any, flags: Any, at: Any) -> Any:
    """Return as uint64 which of the 64 bytes from `at` on are not zero."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word = _load(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.bitcast(builder.icmp_unsigned("!=", word, _vector(ir.IntType(8), 0)), ir.IntType(64))

    return types.uint64(flags, types.int64), generate


def _bit_part(generate: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Callable[..., Any]:
    """Return what makes an int64 of a uint64 by one instruction."""

    @_kernel_part
    def part(typing_context: Any, word: Any) -> Any:
        return types.int64(types.uint64), lambda context, builder, signature, values: generate(builder, values[0])

    return part


_ones = _bit_part(lambda builder, word: builder.ctpop(word))
# The zeros beyond the highest and below the lowest bit that is set; 64 for a word of none.
_leading_zeros = _bit_part(lambda builder, word: builder.ctlz(word, ir.Constant(ir.IntType(1), 0)))
_trailing_zeros = _bit_part(lambda builder, word: builder.cttz(word, ir.Constant(ir.IntType(1), 0)))


@_kernel_part
def _emit_compressed(typing_context: Any, starts: Any, open_length: Any, out: Any, at: Any) -> Any:
    """Write the lengths of the patches that the starts in a word end, and anything after them: 64 items of `out`.

    The first length also counts `open_length` tokens of earlier words.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        byte, short, int32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
        bytes64, bits64 = ir.VectorType(byte, WORD), ir.VectorType(ir.IntType(1), WORD)
        name = "llvm.experimental.vector.compress.v64i8"
        kind = ir.FunctionType(bytes64, [bytes64, bits64, bytes64])
        compress = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        every = _vector(byte, list(range(WORD)))
        chosen = builder.bitcast(arguments[0], bits64)
        places = builder.call(compress, [every, chosen, ir.Constant(bytes64, ir.Undefined)])
        before = builder.shuffle_vector(places, _vector(byte, 0), _vector(int32, [WORD, *range(WORD - 1)]))
        lengths = builder.zext(builder.sub(places, before), ir.VectorType(short, WORD))
        zero = ir.Constant(int32, 0)
        first = builder.add(builder.extract_element(lengths, zero), builder.trunc(arguments[1], short))
        lengths = builder.insert_element(lengths, first, zero)
        place = _address(context, builder, signature.args[2], arguments[2], arguments[3])
        builder.store(lengths, builder.bitcast(place, lengths.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, out, types.int64), generate


def _byte_tables() -> tuple[U16, npt.NDArray[np.uint8]]:
    """Return for each of the 256 bytes the lengths its starts end (uint16 [256, 8]), and what is open at its end."""
    lengths, rest = np.zeros((256, 8), dtype=np.uint16), np.zeros(256, dtype=np.uint8)
    for byte in range(256):
        last = filled = 0
        for place in range(8):
            if byte >> place & 1:
                lengths[byte, filled] = place - last
                last, filled = place, filled + 1
        rest[byte] = 8 - last
    return lengths, rest


_LENGTHS_OF_BYTE, _OPEN_AFTER_BYTE = _byte_tables()


@compiled
def _emit_from_table(starts: np.uint64, open_length: int, out: U16, at: int) -> None:
    """Write the lengths of the patches that the starts in a word end, as `_emit_compressed` does."""
    for shift in range(0, WORD, 8):
        byte = np.int64((starts >> np.uint64(shift)) & np.uint64(0xFF))
        target = out[at : at + 8]
        for i in range(8):
            target[i] = _LENGTHS_OF_BYTE[byte, i]
        if byte:
            target[0] = np.uint16(_LENGTHS_OF_BYTE[byte, 0] + open_length)
            at += _ones(np.uint64(byte))
            open_length = int(_OPEN_AFTER_BYTE[byte])
        else:
            open_length += 8


_emit = _emit_compressed if COMPRESSES else _emit_from_table


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
        place = np.uint64(_trailing_zeros(missing))
        starts |= _ONE << place
        missing &= ~(run << place)
    return starts


@compiled
def _fire_entropy(bits: Bits, place: int, tokens: int, flip: int, key: int, starts: U64) -> np.uint64:
    """Find where the entropy of the token before exceeds a threshold.

    Args:
        bits: bit patterns of entropies.
        place: index of the entropy that decides on the block's first token.
        tokens: tokens of the block.
        flip: see `patch_range`.
        key: the same.
        starts: uint64 [words], written: a bit for each token; those beyond the block are of no meaning.

    Returns:
        Anything but 0 if one of the entropies is not finite.
    """
    broken = _ZERO
    for word in range(0, tokens, WORD):
        at, shift = _word_place(bits.size, place + word)
        _ask_ahead(bits, at)
        starts[word // WORD] = _exceed(bits, at, flip, key) >> shift
        broken |= (_not_finite(bits, at) >> shift) & _valid(tokens - word)
    return broken


@compiled
def _fire_rises(
    bits: Bits, place: int, tokens: int, flip: int, key: int, relative: float, combined: bool, starts: U64
) -> np.uint64:
    """Find where the entropy of the token before exceeds that of the one before it by more than a threshold.

    Args:
        bits: as for `_fire_entropy`, like the others.
        place: index of the entropy that decides on the block's first token, together with the one before.
        tokens: tokens of the block.
        flip: see `patch_range`.
        key: the same.
        relative: the same.
        combined: whether the entropy must exceed a threshold besides.
        starts: written.

    Returns:
        Anything but 0 if one of the entropies is not finite.
    """
    broken = _ZERO
    for word in range(0, tokens, WORD):
        at, shift = _word_place(bits.size, place + word)
        _ask_ahead(bits, at)
        before = bits[max(at - 1, 0)]
        rises = _rise_above(bits, at, before, np.float32(relative))
        if relative != 0 and _rise_beside(bits, at, before, np.float32(relative)):
            rises = _rise_exactly(bits, at, before, relative)
        if combined:
            rises &= _exceed(bits, at, flip, key)
        starts[word // WORD] = rises >> shift
        broken |= (_not_finite(bits, at) >> shift) & _valid(tokens - word)
    return broken


@compiled
def _fire_space(content: U8, place: int, tokens: int, goes_on: bool, starts: U64) -> None:
    """Find where the token before is space-like and the one before that is not.

    Args:
        content: bytes.
        place: index of the byte of the block's first token.
        tokens: tokens of the block.
        goes_on: whether the block is not its document's first.
        starts: as for `_fire_entropy`.
    """
    # Whether the two tokens before the block are space-like, in the two highest bits; BOS is.
    spaces = _space_like(content, place - WORD) if goes_on else _ALL
    for word in range(0, tokens, WORD):
        at, shift = _word_place(content.size, place + word)
        _ask_ahead(content, at)
        last = spaces
        spaces = _space_like(content, at) >> shift
        token = (spaces << _ONE) | (last >> np.uint64(63))
        before = (spaces << np.uint64(2)) | (last >> np.uint64(62))
        starts[word // WORD] = token & ~before


@compiled
def _fire_flags(flags: U8, place: int, tokens: int, starts: U64) -> None:
    """Take the starts that somebody else has found; arguments as for `_fire_entropy`."""
    for word in range(0, tokens, WORD):
        at, shift = _word_place(flags.size, place + word)
        _ask_ahead(flags, at)
        starts[word // WORD] = _flagged(flags, at) >> shift


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
            _emit(found, open_length, out, filled)
        filled += _ones(found)
        open_length = _leading_zeros(found) + (1 if found else open_length)
    return filled, open_length


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
    open_length = 1
    for first in range(0, tokens, BLOCK):
        count = min(BLOCK, tokens - first)
        broken = _ZERO
        if rule == RULE_ENTROPY:
            broken = _fire_entropy(bits, place + first, count, flip, key, starts)
        elif rule == RULE_SPACE:
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
