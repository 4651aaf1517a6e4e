"""Linear maps whose weight gradient is added to a sum by the matrix product that makes it.

Under autocast autograd makes a weight's gradient in half precision, converts it to float32 and adds it to `.grad`: a
product and three passes over memory for every micro batch, and a rounding. Here the product itself adds to the sum, in
float32. Torch's compiler sees an operation that changes one of its arguments, so this may be compiled.

Legend: T positions, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.layers import compute_dtype

# Not `torch.library.custom_op`, whose calls take ten times as long on the host.
torch.library.define("blt_model::add_product", "(Tensor(a!) total, Tensor left, Tensor right) -> ()")


@torch.library.impl("blt_model::add_product", ("CPU", "CUDA"))
def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T @ right to total.

    Args:
        total: [N, K], at least as wide a dtype as the others'.
        left: [T, N].
        right: [T, K] of left's dtype.
    """
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif total.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, left.t(), right, total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))


@torch.library.register_fake("blt_model::add_product")  # type: ignore[untyped-decorator]  # torch gives it no types
def _add_product_fake(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Nothing is returned, whatever the shapes."""


class _AddWeightGradient(torch.autograd.Function):
    """The identity of a map's output, whose backward pass adds the weight's gradient to a sum."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved as the others are: it changes before each backward pass is done, as it should.
        ctx.total = total
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        torch.ops.blt_model.add_product(ctx.total, gradient.flatten(0, -2), x.flatten(0, -2))
        return gradient, None, None


def linear(x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """A linear map without bias; the backward pass adds the weight's gradient to `total` and gives autograd none.

    Args:
        x: [..., K], which requires a gradient: without one there is no backward pass.
        weight: [N, K].
        total: [N, K], contiguous, float32 where the map is computed in half precision.

    Returns:
        [..., N] of the dtype in which maps are computed.
    """
    x = x.to(compute_dtype(x))
    result: Tensor = _AddWeightGradient.apply(F.linear(x, weight.detach()), x, total)
    return result
