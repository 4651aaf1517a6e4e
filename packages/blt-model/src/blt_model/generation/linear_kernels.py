"""A linear map of one row of few, by a Triton kernel that has its weights under way before it may read the row.

With what comes before it (normalisation, or the joining of attention's parts) and after it (residual, SwiGLU) it is one
launch. More rows than one go through torch's matrix products, with kernels for what is around them; `few_kernels` has
another way for the few rows that the vectors of one patch are.

A chain of such maps costs what reading the weights costs only if reading never stops. So every program begins with
loads that depend on nothing, and then lets the next kernel begin: as soon as the first programs end, its are loading.

As in `kernels`, sums are taken in float32 and in a fixed order, and the module needs triton.

Legend: n rows, N outputs, K inputs, H heads, E head width, S parts of a head's attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
import triton
import triton.language as tl
from torch import Tensor

from blt_model.generation.kernels import KINDS, dependence, numbers
from blt_model.pointwise_kernels import swiglu

_HELD = 44
"""Registers of a thread for weights that are under way: measured on an H200, fewer or more are slower."""


@triton.jit
def words_at(pointers, mask, EXACT: tl.constexpr):
    """What lies there, or nought where it is masked; masks cost time where nothing is."""
    if EXACT:  # noqa: SIM108  # triton compiles only the branch that is taken
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=mask, other=0)
    return words


@triton.jit
def chunk_of(weights, row, kept, chunk, WORDS: tl.constexpr, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """A chunk of the weights of some outputs, [EACH, GROUPS, CHUNK] of outputs [EACH, GROUPS]."""
    k = chunk * CHUNK + tl.arange(0, CHUNK)
    pointers = weights + row[:, :, None] * WORDS + k[None, None, :]
    return words_at(pointers, kept[:, :, None] & (k < WORDS)[None, None, :], EXACT)


@triton.jit
def _joined(partial, stats, row, SPLITS: tl.constexpr, HEADS: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr):
    """Attention's output [ROOM * WIDTH] of a row from the parts of each head, with nought beyond the last head."""
    head, e = tl.arange(0, ROOM), tl.arange(0, WIDTH)
    inside = head < HEADS
    first = row * SPLITS * HEADS
    best = tl.load(stats + (first + head) * 2, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        best = tl.maximum(best, tl.load(stats + (first + split * HEADS + head) * 2, mask=inside, other=0.0))
    total = tl.zeros([ROOM, WIDTH], dtype=tl.float32)
    mass = tl.zeros([ROOM], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        at = first + split * HEADS + head
        share = tl.exp(tl.load(stats + at * 2, mask=inside, other=0.0) - best)
        mass += share * tl.load(stats + at * 2 + 1, mask=inside, other=1.0)
        part = tl.load(partial + at[:, None] * WIDTH + e[None, :], mask=inside[:, None], other=0.0)
        total += share[:, None] * part
    return tl.reshape(total / mass[:, None], [ROOM * WIDTH])


@triton.jit
def _pairs(values, CHUNK: tl.constexpr, held: tl.constexpr):
    """Float32 numbers [CHUNK * held] as `numbers` gives those of words, [1, CHUNK] each."""
    if held == 2:
        low, high = tl.split(tl.reshape(values, [CHUNK, 2]))
    else:
        low, high = values, values * 0.0
    return low[None, :], high[None, :]


@triton.jit
def added(sums, words, low, high, kind: tl.constexpr):
    """Sums [EACH, GROUPS, CHUNK] and the products of a chunk of weights; two steps, as each is one instruction."""
    first, second = numbers(words, kind)
    sums += first * low[None, :, :]
    sums += second * high[None, :, :]
    return sums


@triton.jit
def _summed(sums, gate_sums, squares, inputs, eps, NORM: tl.constexpr, GATED: tl.constexpr):
    """Outputs [EACH, GROUPS] from sums of products [EACH, GROUPS, CHUNK] and of squares [GROUPS, CHUNK]."""
    result = tl.sum(sums, 2)
    gate_sum = tl.sum(gate_sums, 2)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, 1) / inputs + eps)
        result *= scale[None, :]
        gate_sum *= scale[None, :]
    if GATED:
        result *= gate_sum / (1.0 + tl.exp(-gate_sum))
    return result


@triton.jit
def outputs_of_one(
    x, stats, weight, norm, outputs, eps, kind: tl.constexpr, WORDS: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr,
    EACH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, EXACT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row: every program sums products for EACH * GROUPS outputs; weights, scales and a plain x are words.

    Gives the outputs [EACH, GROUPS], which they are, and which of them there are.

    The words of a chunk lie along a warp, or several, and the groups' outputs in different warps: so what a warp reads
    of x serves all its outputs, and sums stay within it.
    """
    chunks: tl.constexpr = (WORDS + CHUNK - 1) // CHUNK
    begun: tl.constexpr = chunks if chunks < AHEAD else AHEAD
    held: tl.constexpr = 1 if kind == tl.float32 else 2
    start = tl.program_id(0) * EACH * GROUPS
    row = tl.arange(0, EACH)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    kept = start + row < outputs
    own = weight + start.to(tl.int64) * WORDS
    other = own + outputs.to(tl.int64) * WORDS
    # Weights depend on no other kernel: the first of them are under way before the wait.
    tiles = tl.tuple(())
    for chunk in tl.static_range(begun):
        tiles = tiles + (chunk_of(own, row, kept, chunk, WORDS, CHUNK, EXACT),)  # noqa: RUF005
        if GATED:
            tiles = tiles + (chunk_of(other, row, kept, chunk, WORDS, CHUNK, EXACT),)  # noqa: RUF005
    if DEPENDENT:
        # Earlier, and the next kernel's waiting programs would take room from what runs beside.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([EACH, GROUPS, CHUNK], dtype=tl.float32)
    gate_sums = tl.zeros([EACH, GROUPS, CHUNK], dtype=tl.float32)
    squares = tl.zeros([GROUPS, CHUNK], dtype=tl.float32)
    # Each group reads x for itself.
    mine = tl.zeros([GROUPS], dtype=tl.int32)[:, None] + tl.arange(0, CHUNK)[None, :]
    for chunk in tl.static_range(chunks):
        inside = chunk * CHUNK + mine < WORDS
        if SPLITS > 0:
            low, high = _pairs(_joined(x, stats, 0, SPLITS, HEADS, ROOM, WIDTH), CHUNK, held)
        else:
            low, high = numbers(words_at(x + chunk * CHUNK + mine, inside, EXACT), kind)
        if NORM:
            squares += low * low + high * high
            low_scale, high_scale = numbers(words_at(norm + chunk * CHUNK + mine, inside, EXACT), kind)
            low, high = low * low_scale, high * high_scale
        if chunk + AHEAD < chunks:
            tiles = tiles + (chunk_of(own, row, kept, chunk + AHEAD, WORDS, CHUNK, EXACT),)  # noqa: RUF005
            if GATED:
                tiles = tiles + (chunk_of(other, row, kept, chunk + AHEAD, WORDS, CHUNK, EXACT),)  # noqa: RUF005
        if GATED:
            gate_sums = added(gate_sums, tiles[2 * chunk], low, high, kind)
            sums = added(sums, tiles[2 * chunk + 1], low, high, kind)
        else:
            sums = added(sums, tiles[chunk], low, high, kind)
    return _summed(sums, gate_sums, squares, WORDS * held, eps, NORM, GATED), start + row, kept


@triton.jit
def _linear_one(
    x, stats, weight, norm, residual, out, outputs, eps, residual_scale, kind: tl.constexpr, WORDS: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr,
    ROOM: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    AHEAD: tl.constexpr, EXACT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some outputs of one row."""
    result, row, kept = outputs_of_one(
        x, stats, weight, norm, outputs, eps, kind, WORDS, NORM, GATED, SPLITS, HEADS, ROOM, WIDTH, EACH, GROUPS,
        CHUNK, AHEAD, EXACT, DEPENDENT,
    )  # fmt: skip
    if RESIDUAL:
        result += residual_scale * tl.load(residual + row, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """How the kernel for one row cuts a map."""

    rows: int
    """Outputs of a program, a power of two; of each half where the map is gated."""
    chunk: int
    """Words of 32 bits of each output's weights that are loaded at once, a power of two, 128 or more."""
    warps: int
    ahead: int
    """Chunks under way at once, so many before the wait."""
    registers: int | None = None
    """Of a thread, at most; None for as many as the compiler takes, which are fewer where it need not count them."""

    @property
    def groups(self) -> int:
        """Outputs side by side in different warps."""
        return max(1, min(self.rows, self.warps * 128 // self.chunk))

    def options(self, outputs: int, words: int) -> dict[str, Any]:
        """What a launch of `outputs_of_one` or its like needs of the shape, for so many outputs of so many words."""
        return {
            "EACH": self.rows // self.groups,
            "GROUPS": self.groups,
            "CHUNK": self.chunk,
            "AHEAD": self.ahead,
            "EXACT": outputs % self.rows == 0 and words % self.chunk == 0,
            "num_warps": self.warps,
            "maxnreg": self.registers,
        }


@functools.cache
def linear_shape(outputs: int, words: int, *, gated: bool, joined: bool) -> LinearShape:
    """The launch shape for a map of one row.

    The more programs there are, the sooner the first are replaced by others, of this map or of the next; so each takes
    few outputs, and has no more weights under way than lets many programs be resident at once. Chunks are of one
    warp's width, so that no sum crosses warps.

    Args:
        outputs: N; of each half where the map is gated.
        words: of 32 bits, of an output's weights.
        gated: whether the map has a second half.
        joined: whether attention's parts are joined before, which is done once in a program: all words in one chunk.
    """
    if joined:
        rows = 8 if outputs >= 8 * 256 else 4
        return LinearShape(rows=rows, chunk=triton.next_power_of_2(words), warps=4, ahead=1)
    each = 8 if gated else 4
    return LinearShape(rows=4, chunk=128, warps=4, ahead=min(triton.cdiv(words, 128), _HELD // each))


def _linear_rows(x: Tensor, weight: Tensor, gated: bool, residual: Tensor | None, residual_scale: float) -> Tensor:
    """What `linear` does after the normalisation, by torch's matrix products."""
    if residual is not None and not gated:
        return torch.addmm(residual.to(x.dtype), x, weight.T, beta=residual_scale)
    result = F.linear(x, weight)
    if gated:
        result = swiglu(result, dependence=dependence())
    return result if residual is None else torch.add(result, residual, alpha=residual_scale)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    stats: Tensor | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    shape: LinearShape | None = None,
) -> Tensor:
    """A linear map of few rows: a kernel of its own for one row, torch's matrix products for more.

    Args:
        x: [n, K] contiguous, of the weight's dtype; or, where there are stats, attention's parts, float32 [n, S, H, E].
        weight: [N, K] contiguous; [2 * N, K], gates first, where it is gated.
        norm: [K] scales of a root mean square normalisation that comes before, of the weight's dtype; None for none.
        eps: of the normalisation.
        stats: float32 [n, S, H, 2] what `attend` gives.
        gated: give silu(gate) * value.
        residual: [n, N] to add to the result; None for none.
        residual_scale: times which it is added.
        dtype: of the result; None for the weight's.
        shape: of the kernel for one row; None for what `linear_shape` says.

    Returns:
        [n, N].
    """
    if len(x) > 1:
        if stats is not None:
            x = join(x, stats, weight.dtype)
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, eps)
        kind = dtype or weight.dtype
        return _linear_rows(x.to(kind), weight.to(kind), gated, residual, residual_scale)
    out = x.new_empty((1, len(weight) // (2 if gated else 1)), dtype=dtype or weight.dtype)
    _launch_one(x, weight, norm, eps, stats, gated, residual, residual_scale, out, shape)
    return out


def _launch_one(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    eps: float,
    stats: Tensor | None,
    gated: bool,
    residual: Tensor | None,
    residual_scale: float,
    out: Tensor,
    shape: LinearShape | None,
) -> None:
    """What `linear` does for one row, into out [1, N]."""
    outputs, words = out.shape[1], weight.shape[1] * weight.element_size() // 4
    splits, heads, width = (0, 1, 1) if stats is None else (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    if shape is None:
        shape = linear_shape(outputs, words, gated=gated, joined=stats is not None)
    # Pointers that are not read still have to be some.
    _linear_one[(triton.cdiv(outputs, shape.rows),)](
        x if stats is not None else x.view(torch.int32),
        x if stats is None else stats,
        weight.view(torch.int32),
        weight.view(torch.int32) if norm is None else norm.view(torch.int32),
        x if residual is None else residual,
        out,
        outputs,
        eps,
        residual_scale,
        kind=KINDS[weight.dtype],
        WORDS=words,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        SPLITS=splits,
        HEADS=heads,
        ROOM=triton.next_power_of_2(heads),
        WIDTH=width,
        **shape.options(outputs, words),
        **dependence(),
    )


@triton.jit
def _join(
    partial,
    stats,
    out,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    ROOM: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0)
    k = tl.arange(0, ROOM * WIDTH)
    result = _joined(partial, stats, n, SPLITS, HEADS, ROOM, WIDTH)
    tl.store(out + n * HEADS * WIDTH + k, result.to(out.dtype.element_ty), mask=k < HEADS * WIDTH)


def join(partial: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention's output [n, H * E] from what `attend` gives."""
    rows, splits, heads, width = partial.shape
    out = partial.new_empty((rows, heads * width), dtype=dtype)
    room = triton.next_power_of_2(heads)
    _join[(rows,)](partial, stats, out, SPLITS=splits, HEADS=heads, ROOM=room, WIDTH=width, **dependence(), num_warps=4)
    return out
