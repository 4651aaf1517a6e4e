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
θ. Differences are taken in float64, which holds the difference of any two float16 exactly.

The vectors are written in LLVM's own language (Numba's `intrinsic`), which compiles them for any processor. They must
stay in this file: Numba's cache on disk knows of changes in the file of a kernel alone.

The loops release the GIL and are single-threaded; `boundaries` runs them on a few Python threads. Numba's own
parallel loops are avoided on purpose: their OpenMP layer aborts a process that forks (as data loaders do), and their
work queue aborts one that calls from two threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]
#: Bit patterns of entropies: uint16 of float16 or uint32 of float32.
Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

# Rules by number: a kernel takes a number, so that one compilation serves all schemes.
RULE_ENTROPY: Final = 0
RULE_MONOTONIC: Final = 1
RULE_COMBINED: Final = 2
RULE_SPACE: Final = 3
RULE_STATIC: Final = 4
RULE_FLAGS: Final = 5

#: Tokens a word.
WORD: Final = 64

#: The kernels read whole words: arrays of data must have at least so many items, and room for lengths as many to spare.
SLACK: Final = WORD

#: Bytes ahead of the word at work that are asked of memory; processors do not look across a page (4 kB) by themselves.
_AHEAD: Final = 8192

#: float32 values of this magnitude and more round to an infinity in float16.
FLOAT16_OVERFLOW: Final = 65520.0

_ALL: Final = np.uint64(2**64 - 1)
_ONE: Final = np.uint64(1)
_ZERO: Final = np.uint64(0)


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


def _can_compress() -> bool:
    """Return whether the processor that is compiled for packs the bytes of a vector (AVX-512 VBMI2)."""
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return llvm.llvm_version_info[0] >= 19 and "+avx512vbmi2" in features.split(",")


#: Whether lengths are made by vector compression rather than from the table.
COMPRESSES: Final = _can_compress()


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
    """Load a word of an array's items, and ask memory for those some words on."""
    width: int = cast(Any, kind.dtype).bitwidth
    vector = ir.VectorType(ir.IntType(width), WORD)
    address = _address(context, builder, kind, array, index)
    byte, int32 = ir.IntType(8), ir.IntType(32)
    name = "llvm.prefetch.p0" if llvm.llvm_version_info[0] >= 17 else "llvm.prefetch.p0i8"
    signature = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), int32, int32, int32])
    prefetch = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    ahead = builder.bitcast(address, byte.as_pointer())
    for line in range(0, WORD * width // 8, 64):
        place = builder.gep(ahead, [ir.Constant(ir.IntType(64), _AHEAD + line)])
        # To read, to be kept, data rather than code.
        builder.call(prefetch, [place, ir.Constant(int32, 0), ir.Constant(int32, 3), ir.Constant(int32, 1)])
    return builder.load(builder.bitcast(address, vector.as_pointer()), align=width // 8)


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


def _kernel_part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let kernels call what a function writes in LLVM's language."""
    return cast(Callable[..., Any], intrinsic(function))


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


@_kernel_part
def _rise(typing_context: Any, bits: Any, at: Any, before: Any, relative: Any) -> Any:
    """Return as uint64 which of the 64 entropies from `at` on exceed the one before by more than `relative`.

    The bit pattern `before` stands before the first of them.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        now = _as_float32(builder, _load(context, builder, signature.args[0], arguments[0], arguments[1]))
        lead = _as_float32(builder, _splat(builder, arguments[2], 1))
        zero, double = ir.Constant(ir.IntType(32), 0), ir.VectorType(ir.DoubleType(), WORD)
        last = builder.shuffle_vector(now, now, _vector(ir.IntType(32), [0, *range(WORD - 1)]))
        last = builder.insert_element(last, builder.extract_element(lead, zero), zero)
        rises = builder.fsub(builder.fpext(now, double), builder.fpext(last, double))
        above = builder.fcmp_ordered(">", rises, _splat(builder, arguments[3]))
        return builder.bitcast(above, ir.IntType(64))

    return types.uint64(bits, types.int64, bits.dtype, types.float64), generate


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


@_kernel_part
def _ones(typing_context: Any, word: Any) -> Any:
    """Return how many bits of a uint64 are set."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@_kernel_part
def _leading_zeros(typing_context: Any, word: Any) -> Any:
    """Return how many bits above the highest set bit of a uint64 are not set; 64 for zero."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@_kernel_part
def _trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Return how many bits below the lowest set bit of a uint64 are not set; 64 for zero."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


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
def _fill_static(tokens: int, length: int, limit: int, out: U16, filled: int, write: bool) -> int:
    """Append the lengths of one document of equal patches; return how many lengths there are now."""
    if write:
        out[filled] = np.uint16(1)
    filled += 1
    tokens -= 1
    if length <= limit:
        whole = tokens // length
        if write:
            out[filled : filled + whole] = np.uint16(length)
        filled += whole
        tokens -= whole * length
        if tokens and write:
            out[filled] = np.uint16(tokens)
        return filled + (tokens > 0)
    while tokens:
        rest = min(length, tokens)
        tokens -= rest
        while rest:
            if write:
                out[filled] = np.uint16(min(rest, limit))
            filled += 1
            rest -= min(rest, limit)
    return filled


@compiled
def _fires(
    rule: int, data: U8, bits: Bits, place: int, lead: np.uint64, flip: int, key: int, relative: float
) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Apply a rule to a word of 64 tokens.

    Args:
        rule: one of the RULE_ numbers.
        data: bytes of content, or flags.
        bits: bit patterns of entropies.
        place: index in `data` or `bits` of what decides on the word's first token. It may be beyond the last word's
            place; what the word holds beyond the arrays' end is then of no meaning.
        lead: space: what the third value returned was for the word before.
        flip: parameter, see `patch_range`.
        key: the same.
        relative: the same.

    Returns:
        The tokens that start a patch; those before which an entropy is not finite; space: bits for the next word.
    """
    size = data.size if rule >= RULE_SPACE else bits.size
    whole = min(place, size - WORD)
    # Read the last whole word where a whole word from `place` on would pass the end, and shift it into its place.
    shift = np.uint64((place - whole) & (WORD - 1))
    if rule == RULE_FLAGS:
        return _flagged(data, whole) >> shift, _ZERO, _ZERO
    if rule == RULE_SPACE:
        spaces = _space_like(data, whole) >> shift
        # Bit 0 is the token of the byte before `place`; the token that is decided on comes after that.
        token = (spaces << _ONE) | (lead & _ONE)
        before = (token << _ONE) | (lead >> _ONE)
        return token & ~before, _ZERO, (spaces >> np.uint64(63)) | ((spaces >> np.uint64(62) & _ONE) << _ONE)
    broken = _not_finite(bits, whole) >> shift
    if rule == RULE_ENTROPY:
        return _exceed(bits, whole, flip, key) >> shift, broken, _ZERO
    rises = _rise(bits, whole, bits[max(whole - 1, 0)], relative)
    if rule == RULE_COMBINED:
        rises &= _exceed(bits, whole, flip, key)
    return rises >> shift, broken, _ZERO


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
    write: bool,
) -> int:
    """Patch one document of at least one token; return how many lengths there are now, or -1 for a broken entropy.

    Bit p of the document's words stands for token p + 1, so the bits of a word are decided by as many entropies from
    the word's own place on. The last bit stands for the next document's BOS, whose start ends the last patch.
    """
    open_length = 1
    broken, lead = _ZERO, np.uint64(3)
    # Token 1 always starts a patch; where rises count, token 2 does too, as nothing has risen before.
    forced = np.uint64(3) if rule in (RULE_MONOTONIC, RULE_COMBINED) else _ONE
    for first in range(0, tokens, WORD):
        starts, bad, lead = _fires(rule, data, bits, place + first, lead, flip, key, relative)
        starts |= forced
        forced = _ZERO
        valid = _ALL
        if tokens - first <= WORD:
            valid >>= np.uint64(WORD - (tokens - first))
            starts = (starts & valid) | (_ONE << np.uint64(tokens - first - 1))
        broken |= bad & valid
        if limit - open_length < WORD:
            starts = _split(starts, open_length, limit, valid)
        if write:
            _emit(starts, open_length, out, filled)
        filled += _ones(starts)
        open_length = _leading_zeros(starts) + (1 if starts else open_length)
    return -1 if broken else filled


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
        data: space: uint8 all documents' bytes; flags: uint8 [T], by framed token, where a patch starts. At least
            `SLACK` items where the rule reads them, as of `bits`.
        data_offsets: int64 [D + 1] where each document begins in `data`.
        bits: bit patterns of the entropy after each of the T framed tokens, where the rule reads them.
        token_offsets: int64 [D + 1] where each document's tokens begin in `bits`, from 0 to T.
        flip: entropy and combined: what is XORed with the bit patterns.
        key: and then compared with; static: the patch length.
        relative: monotonic and combined: θ_r in nats.
        limit: the longest patch, in tokens, up to 65,535.
        begin: first document.
        end: one past the last document.
        out: uint16 with room for one length per token of these documents and `SLACK` more; their lengths are written
            end to end. Empty to count alone.
        counts: int64 [D] the number of patches of each document, written.

    Returns:
        -1, or the first document found to have an entropy that is not finite.
    """
    write = out.size > 0
    filled = 0
    for d in range(begin, end):
        tokens = token_offsets[d + 1] - token_offsets[d]
        before = filled
        if tokens and rule == RULE_STATIC:
            filled = _fill_static(tokens, key, limit, out, filled, write)
        elif tokens:
            # A flag is that of the token itself, which bit 0 of the first word is for token 1.
            place = data_offsets[d] + (rule == RULE_FLAGS) if rule >= RULE_SPACE else token_offsets[d]
            filled = _patch_one(rule, data, bits, place, tokens, flip, key, relative, limit, out, filled, write)
            if filled < 0:
                return d
        counts[d] = filled - before
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
