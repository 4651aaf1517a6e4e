"""Sums of looked-up rows whose gradient is added straight into the table's `.grad`.

Autograd makes a gradient as large as the table, full of zeros, in every backward pass, and adds it to the one before:
for a table of billions of numbers that costs more than all else that the lookup does. Here the rows that were looked up
are added to in place, and nothing of the table's size is made but `.grad` itself.

Sums come out the same in every run of a program: in the order of the tokens, not by atomic additions.

Legend: T tokens, M rows of each token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor
from torch.autograd.function import once_differentiable

from blt_model.triton_support import has_triton


def dense_gradient(parameter: Tensor) -> Tensor:
    """A parameter's `.grad`, to add to in place; zeros where there was none.

    Args:
        parameter: a leaf; plain, or one whose `zeros_like` is placed as it is.
    """
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def add_rows(total: Tensor, rows: Tensor, values: Tensor, weights: Tensor | None = None) -> None:
    """Add values[t] * weights[t, m] to total[rows[t, m]] for all t and m, in place.

    Args:
        total: [rows, dim], contiguous.
        rows: int64 [T, M].
        values: [T, dim] of total's dtype.
        weights: [T, M] of total's dtype; None where all are 1.
    """
    if has_triton(total):
        from blt_model import row_kernels

        row_kernels.add_rows(total, rows, values, weights)
        return
    for column in range(rows.shape[1]):
        part = values if weights is None else values * weights[:, column, None]
        if total.device.type == "cuda":
            # Unlike index_add_, this sorts.
            total.index_put_((rows[:, column],), part, accumulate=True)
        else:
            total.index_add_(0, rows[:, column], part)


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(rows, weights)
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        rows, weights = ctx.saved_tensors
        add_rows(dense_gradient(ctx.table), rows, gradients[0], weights)
        return None, None, None


def sum_rows(table: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sum of each token's rows; the backward pass adds to `table.grad` and gives autograd nothing.

    Args:
        table: [rows, dim], a leaf.
        rows: int64 [T, M].
        weights: [T, M] of the table's dtype, without gradient; None where all are 1.

    Returns:
        [T, dim] of the table's dtype.
    """
    result: Tensor = _SumRows.apply(table, rows, weights)
    return result
