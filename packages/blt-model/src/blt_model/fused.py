"""Root mean square normalisation and SwiGLU with backwards of their own, for eager float32 and float64 on the CPU.

There autograd keeps, and memory must carry, every step between; here the rows are worked through in pieces that stay in
the processor's cache, and only the inputs are kept. On CUDA torch has a fused normalisation, and SwiGLU is a kernel of
our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model import pointwise
from blt_model.triton_support import takes_kernels

PIECE = 1 << 18
"""Numbers that a thread works on at once: 1 MiB of float32. Smaller pieces gain nothing, and cost a meeting of all
threads each, which takes long where other programs hold a core."""


def in_pieces(tensor: Tensor) -> bool:
    """Whether work on a tensor is worth cutting: eager, on the CPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _by_hand(tensor: Tensor) -> bool:
    """Whether the functions here are what is fastest."""
    return tensor.dtype in (torch.float32, torch.float64) and in_pieces(tensor)


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Cut rows of so many numbers each into what fits into the threads' caches."""
    step = max(1, PIECE * torch.get_num_threads() // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result = torch.empty_like(x)
        scales = x.new_empty(len(x), 1)
        for rows in pieces(*x.shape):
            scale = torch.linalg.vector_norm(x[rows], dim=-1, keepdim=True).square_().div_(x.shape[-1])
            scales[rows] = scale.add_(eps).rsqrt_()
            torch.mul(x[rows], scale, out=result[rows]).mul_(weight)
        ctx.save_for_backward(x, weight, scales)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        (gradient,) = gradients
        result = torch.empty_like(x)
        weight_gradient = torch.zeros_like(weight)
        for rows in pieces(*x.shape):
            scale, part, normal = scales[rows], result[rows], x[rows] * scales[rows]
            product = gradient[rows] * normal
            weight_gradient += product.sum(0)
            mean = torch.mv(product, weight).div_(x.shape[-1])
            torch.mul(gradient[rows], weight, out=part)
            part.addcmul_(normal, mean[:, None], value=-1).mul_(scale)
        return result, weight_gradient, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, and scale.

    Args:
        x: [..., dim].
        weight: [dim].
        eps: added to the mean square.

    Returns:
        [..., dim] of x's dtype.
    """
    if _by_hand(x) and weight.dtype == x.dtype:
        result: Tensor = _RMSNorm.apply(x.flatten(0, -2), weight, eps)
        return result.view(x.shape)
    # The fused kernels take one dtype only; they compute in float32 within.
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_value: Tensor) -> Tensor:
        rows, double = gate_value.shape
        result = gate_value.new_empty(rows, double // 2)
        for part in pieces(*gate_value.shape):
            gate, value = gate_value[part].chunk(2, dim=-1)
            torch.mul(F.silu(gate), value, out=result[part])
        ctx.save_for_backward(gate_value)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_value,) = ctx.saved_tensors
        result = torch.empty_like(gate_value)
        for part in pieces(*gate_value.shape):
            gate, value = gate_value[part].chunk(2, dim=-1)
            gate_gradient, value_gradient = result[part].chunk(2, dim=-1)
            gradient = gradients[0][part]
            torch.mul(gradient, F.silu(gate), out=value_gradient)
            gate_gradient.copy_(torch.ops.aten.silu_backward(gradient * value, gate))
        return result


def swiglu(gate_value: Tensor) -> Tensor:
    """silu(gate) * value.

    Args:
        gate_value: [T, 2 * hidden], the gates first.

    Returns:
        [T, hidden].
    """
    if _by_hand(gate_value):
        result: Tensor = _SwiGLU.apply(gate_value)
        return result
    if takes_kernels(gate_value) and gate_value.dim() == 2:
        gated: Tensor = pointwise.swiglu(gate_value)
        return gated
    gate, value = gate_value.chunk(2, dim=-1)
    return F.silu(gate) * value
