"""The summed negative log-likelihood of a batch, shared by training and evaluation.

Log-softmax needs float32, and a float32 copy of all logits would be the largest tensor of a small model. So the rows
are worked through in chunks, on CUDA by one kernel a few at a time, and the gradient, which has the logits' dtype, is
made in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.packed import IGNORED_TARGET
from blt_model.triton_support import takes_kernels

CHUNK_TOKENS = 8192
WIDEST = 4096
"""Logits of a token up to which a kernel takes them."""


def _kept(ctx: Any, gradient: Tensor | None, total: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """The results, when the gradient is kept for the backward pass."""
    ctx.save_for_backward(gradient)
    ctx.mark_non_differentiable(total)
    return total + penalty, total


class _CrossEntropySum(torch.autograd.Function):
    """Gives the differentiable objective and, where the normaliser counts too, the plain loss beside it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        if takes_kernels(logits) and logits.shape[1] <= WIDEST and not torch.compiler.is_compiling():
            from blt_model import step_kernels

            with_gradient = ctx.needs_input_grad[0]
            losses, penalties, made = step_kernels.cross_entropy(
                logits, targets, z_loss, IGNORED_TARGET, with_gradient=with_gradient
            )
            return _kept(ctx, made if with_gradient else None, losses.sum(), penalties.sum())
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        penalty = torch.zeros_like(total)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            chunk, chunk_targets = logits[rows].to(wide), targets[rows]
            kept = (chunk_targets != IGNORED_TARGET)[:, None]
            if z_loss:
                normaliser = chunk.logsumexp(dim=-1, keepdim=True)
                log_probabilities = chunk - normaliser
                penalty = penalty + z_loss * (normaliser.square() * kept).sum()
            else:
                log_probabilities = torch.log_softmax(chunk, dim=-1)
            total = total + F.nll_loss(log_probabilities, chunk_targets, ignore_index=IGNORED_TARGET, reduction="sum")
            if gradient is not None:
                part = log_probabilities.exp_()
                if z_loss:
                    part *= 1 + 2 * z_loss * normaliser
                part.scatter_add_(1, chunk_targets.clamp(min=0)[:, None], -kept.to(wide))
                gradient[rows] = part * kept
        return _kept(ctx, gradient, total, penalty)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of the negative log-probability of the target.

    Args:
        logits: [T, V] of any floating dtype.
        targets: int64 [T]; positions of target -100 count nothing.

    Returns:
        Scalar in nats, at least float32, differentiable once.
    """
    return cross_entropy_and_z_sum(logits, targets, 0.0)[0]


def cross_entropy_and_z_sum(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Sum over positions of the loss that keeps the softmax's normaliser near 1 besides predicting the target.

    Args:
        logits: [T, V] of any floating dtype.
        targets: int64 [T]; positions of target -100 count nothing.
        z_loss: weight of the squared log of the normaliser; 0 for the plain loss.

    Returns:
        Two scalars of at least float32: the sum of -log p(target) + z_loss * log(sum of exp(logits)) ** 2,
        differentiable once, and the sum of -log p(target) alone, in nats, with no gradient.
    """
    result: tuple[Tensor, Tensor] = _CrossEntropySum.apply(logits, targets, z_loss)
    return result
