"""Triton kernel for linear maps of the few rows that a patch of one text consists of, with a normalisation before.

One row is for `linear_kernels`, many are for torch. As in `kernels`, sums are taken in float32 and in a fixed order,
and the module needs triton.

Legend: n rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_model.generation.kernels import KINDS, dependence, numbers

MOST_ROWS = 16
"""That the matrix units take at once, and that are taken."""
_OUTPUTS = 16
"""Of a program."""


@triton.jit
def _normed_rows(
    x, norm, weight, out, rows, outputs, eps, kind: tl.constexpr, WORDS: tl.constexpr, ROOM: tl.constexpr,
    SCALED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows; weights, scales and inputs are words of 32 bits."""
    held: tl.constexpr = 1 if kind == tl.float32 else 2
    word, row = tl.arange(0, ROOM), tl.arange(0, ROWS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    kept, inside = output < outputs, word < WORDS
    # Weights depend on no other kernel: they are under way before the wait.
    tile = tl.load(
        weight + output.to(tl.int64)[:, None] * WORDS + word[None, :], mask=kept[:, None] & inside[None, :], other=0
    )
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inputs = tl.load(x + row[:, None] * WORDS + word[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0)
    low, high = numbers(inputs, kind)
    factors = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (WORDS * held) + eps)
    if SCALED:
        low_scale, high_scale = numbers(tl.load(norm + word, mask=inside, other=0), kind)
        low, high = low * low_scale[None, :], high * high_scale[None, :]
    low_weight, high_weight = numbers(tile, kind)
    sums = tl.dot(low.to(kind), tl.trans(low_weight.to(kind)), input_precision="ieee")
    if held == 2:
        sums = tl.dot(high.to(kind), tl.trans(high_weight.to(kind)), sums, input_precision="ieee")
    result = sums * factors[:, None]
    at = out + row[:, None] * outputs + output[None, :]
    tl.store(at, result.to(kind), mask=(row < rows)[:, None] & kept[None, :])


def normed_rows(x: Tensor, weight: Tensor, eps: float, norm: Tensor | None = None) -> Tensor:
    """A linear map of a few rows after a root mean square normalisation.

    Args:
        x: [n, K] contiguous, at most MOST_ROWS rows, of the weight's dtype.
        weight: [N, K] contiguous.
        eps: of the normalisation.
        norm: [K] its scales; None for ones.

    Returns:
        [n, N].
    """
    rows, outputs = len(x), len(weight)
    words = x.shape[1] * x.element_size() // 4
    out = x.new_empty((rows, outputs))
    _normed_rows[(triton.cdiv(outputs, _OUTPUTS),)](
        x.view(torch.int32),
        weight.view(torch.int32) if norm is None else norm.view(torch.int32),
        weight.view(torch.int32),
        out,
        rows,
        outputs,
        eps,
        kind=KINDS[weight.dtype],
        WORDS=words,
        ROOM=triton.next_power_of_2(words),
        SCALED=norm is not None,
        ROWS=MOST_ROWS,
        OUTPUTS=_OUTPUTS,
        **dependence(),
        num_warps=8,
    )
    return out
