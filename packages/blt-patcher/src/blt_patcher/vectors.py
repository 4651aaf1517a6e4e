"""What the kernels are made of: operations on 64 tokens at a time, in LLVM's own language.

Numba's `intrinsic` lets a kernel contain them; LLVM compiles them for any processor, with vectors where it has them.

Numba's cache on disk knows of changes in the file of a kernel alone, so `kernels` holds the checksum of this file: a
test fails until it is renewed, which makes that file another one and old machine code void.
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

U16 = npt.NDArray[np.uint16]

#: Tokens a word.
WORD: Final = 64

#: Bytes ahead of the word at work that are asked of memory; processors do not look across a page (4 kB) by themselves.
_AHEAD: Final = 8192

#: float32 values of this magnitude and more round to an infinity in float16.
FLOAT16_OVERFLOW: Final = 65520.0

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
def ask_ahead(typing_context: Any, array: Any, at: Any) -> Any:
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
def exceed(typing_context: Any, bits: Any, at: Any, flip: Any, key: Any) -> Any:
    """Return as uint64 which of the 64 items from `at` on, XOR `flip`, are above `key` as signed integers."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        word = _load(context, builder, signature.args[0], arguments[0], arguments[1])
        lane = word.type.element
        flips, keys = (_splat(builder, builder.trunc(argument, lane)) for argument in arguments[2:])
        above = builder.icmp_signed(">", builder.xor(word, flips), keys)
        return builder.bitcast(above, ir.IntType(64))

    return types.uint64(bits, types.int64, types.int64, types.int64), generate


@_kernel_part
def not_finite(typing_context: Any, bits: Any, at: Any) -> Any:
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
rise_above = _rise_part(ir.FloatType, ">")
rise_beside = _rise_part(ir.FloatType, "==")
rise_exactly = _rise_part(ir.DoubleType, ">")


@_kernel_part
def space_like(typing_context: Any, content: Any, at: Any) -> Any:
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
def flagged(typing_context: Any, flags: Any, at: Any) -> Any:
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


ones = _bit_part(lambda builder, word: builder.ctpop(word))
# The zeros beyond the highest and below the lowest bit that is set; 64 for a word of none.
leading_zeros = _bit_part(lambda builder, word: builder.ctlz(word, ir.Constant(ir.IntType(1), 0)))
trailing_zeros = _bit_part(lambda builder, word: builder.cttz(word, ir.Constant(ir.IntType(1), 0)))


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
        gaps = builder.sub(places, before)
        place = _address(context, builder, signature.args[2], arguments[2], arguments[3])
        half = ir.VectorType(short, WORD // 2)

        def lengths(first: int) -> ir.Value:
            lanes = _vector(int32, list(range(first, first + WORD // 2)), WORD // 2)
            return builder.zext(builder.shuffle_vector(gaps, gaps, lanes), half)

        def write(values: ir.Value, first: int) -> None:
            target = builder.gep(place, [ir.Constant(ir.IntType(64), first)])
            builder.store(values, builder.bitcast(target, half.as_pointer()), align=2)

        zero, low = ir.Constant(int32, 0), lengths(0)
        first = builder.add(builder.extract_element(low, zero), builder.trunc(arguments[1], short))
        write(builder.insert_element(low, first, zero), 0)
        many = builder.icmp_unsigned(">", builder.ctpop(arguments[0]), ir.Constant(ir.IntType(64), WORD // 2))
        with builder.if_then(many, likely=False):
            write(lengths(WORD // 2), WORD // 2)
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
            at += ones(np.uint64(byte))
            open_length = int(_OPEN_AFTER_BYTE[byte])
        else:
            open_length += 8


emit_lengths = _emit_compressed if COMPRESSES else _emit_from_table
