"""A linear map of a few rows, as a patch of one text has vectors, by a kernel like that for one row.

Each program keeps the weights that it has read for all rows, so that the rows after the first cost no reading. Torch's
products, which `linear_kernels` takes for rows of several texts, would each need launches for what is around them, and
none of their weights are under way before the kernel that they wait for has ended.

As in `kernels`, sums are taken in float32 and in a fixed order, and the module needs triton.

Legend: n rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
import triton
import triton.language as tl
from torch import Tensor

from blt_model.generation.kernels import KINDS, dependence, numbers
from blt_model.generation.linear_kernels import LinearShape, added, chunk_of, linear, linear_shape, words_at

MOST_ROWS = 4
"""That the kernel takes; more go through torch's products."""


@triton.jit
def _scaled(sums, squares, inputs, eps, NORM: tl.constexpr):
    """A row's outputs [EACH, GROUPS] from sums of products [EACH, GROUPS, CHUNK] and of squares [GROUPS, CHUNK]."""
    result = tl.sum(sums, 2)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, 1) / inputs + eps)
        result *= scale[None, :]
    return result


@triton.jit
def _linear_few(
    x, weight, norm, residual, out, outputs, eps, residual_scale, kind: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, RESIDUAL: tl.constexpr, EACH: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, EXACT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows; what lies where is as in `linear_kernels.outputs_of_one`."""
    chunks: tl.constexpr = (WORDS + CHUNK - 1) // CHUNK
    begun: tl.constexpr = chunks if chunks < AHEAD else AHEAD
    held: tl.constexpr = 1 if kind == tl.float32 else 2
    start = tl.program_id(0) * EACH * GROUPS
    row = tl.arange(0, EACH)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    kept = start + row < outputs
    own = weight + start.to(tl.int64) * WORDS
    # Weights depend on no other kernel: the first of them are under way before the wait.
    tiles = tl.tuple(())
    for chunk in tl.static_range(begun):
        tiles = tiles + (chunk_of(own, row, kept, chunk, WORDS, CHUNK, EXACT),)  # noqa: RUF005
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Of each row, as tuples that are made anew for every chunk.
    sums = tl.tuple(())
    squares = tl.tuple(())
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([EACH, GROUPS, CHUNK], dtype=tl.float32),)  # noqa: RUF005
        squares = squares + (tl.zeros([GROUPS, CHUNK], dtype=tl.float32),)  # noqa: RUF005
    # Each group reads the rows for itself.
    mine = tl.zeros([GROUPS], dtype=tl.int32)[:, None] + tl.arange(0, CHUNK)[None, :]
    for chunk in tl.static_range(chunks):
        inside = chunk * CHUNK + mine < WORDS
        if SCALED:
            low_scale, high_scale = numbers(words_at(norm + chunk * CHUNK + mine, inside, EXACT), kind)
        if chunk + AHEAD < chunks:
            tiles = tiles + (chunk_of(own, row, kept, chunk + AHEAD, WORDS, CHUNK, EXACT),)  # noqa: RUF005
        new_sums = tl.tuple(())
        new_squares = tl.tuple(())
        for n in tl.static_range(ROWS):
            low, high = numbers(words_at(x + n * WORDS + chunk * CHUNK + mine, inside, EXACT), kind)
            if NORM:
                new_squares = new_squares + (squares[n] + low * low + high * high,)  # noqa: RUF005
            if SCALED:
                low, high = low * low_scale, high * high_scale
            new_sums = new_sums + (added(sums[n], tiles[chunk], low, high, kind),)  # noqa: RUF005
        sums = new_sums
        if NORM:
            squares = new_squares
    for n in tl.static_range(ROWS):
        result = _scaled(sums[n], squares[n], WORDS * held, eps, NORM)
        at = n * outputs + start + row
        if RESIDUAL:
            result += residual_scale * tl.load(residual + at, mask=kept, other=0.0).to(tl.float32)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=kept)


def few_shape(outputs: int, words: int) -> LinearShape:
    """The launch shape for a map of a few rows.

    As for one row, but where there are many outputs a program takes twice as many, with half the warps, so that what it
    reads of the rows serves more: measured on an H200 for 18,432 outputs of two rows of 1,024.

    Args:
        outputs: N.
        words: of 32 bits, of an output's weights.
    """
    if outputs < 16 * 256:
        return linear_shape(outputs, words, gated=False, joined=False)
    return LinearShape(rows=8, chunk=256, warps=2, ahead=2)


def few_rows(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    shape: LinearShape | None = None,
) -> Tensor:
    """A linear map of a few rows that reads its weights once, in one launch with what is around it.

    More rows than `MOST_ROWS` go through torch's matrix products.

    Args:
        x: [n, K] contiguous, of the weight's dtype.
        weight: [N, K] contiguous.
        norm: [K] scales of the normalisation, of the weight's dtype; None for none.
        eps: of a root mean square normalisation that comes before; None for no normalisation.
        residual: [n, N] contiguous, to add to the result; None for none.
        residual_scale: times which it is added.
        shape: of the kernel; None for what `few_shape` says.

    Returns:
        [n, N] of the weight's dtype.
    """
    if norm is not None and eps is None:
        raise ValueError("scales of a normalisation need its eps")
    if len(x) > MOST_ROWS:
        if eps is not None:
            x = F.rms_norm(x, x.shape[1:], norm, eps)
        return linear(x, weight, residual=residual, residual_scale=residual_scale)
    outputs, words = len(weight), weight.shape[1] * weight.element_size() // 4
    out = x.new_empty((len(x), outputs))
    if shape is None:
        shape = few_shape(outputs, words)
    # Pointers that are not read still have to be some.
    _linear_few[(triton.cdiv(outputs, shape.rows),)](
        x.view(torch.int32),
        weight.view(torch.int32),
        weight.view(torch.int32) if norm is None else norm.view(torch.int32),
        x if residual is None else residual,
        out,
        outputs,
        0.0 if eps is None else eps,
        residual_scale,
        kind=KINDS[weight.dtype],
        WORDS=words,
        ROWS=len(x),
        NORM=eps is not None,
        SCALED=norm is not None,
        RESIDUAL=residual is not None,
        **shape.options(outputs, words),
        **dependence(),
    )
    return out
