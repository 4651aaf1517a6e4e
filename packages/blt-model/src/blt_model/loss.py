"""The summed negative log-likelihood of a batch, shared by training and evaluation.

Log-softmax needs float32, and a float32 copy of all logits would be the largest tensor of a small model. So the rows
are worked through in chunks, and the gradient, which has the logits' dtype, is made in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.packed import IGNORED_TARGET

CHUNK_TOKENS = 8192


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            log_probabilities = torch.log_softmax(logits[rows].to(wide), dim=-1)
            total = total + F.nll_loss(log_probabilities, targets[rows], ignore_index=IGNORED_TARGET, reduction="sum")
            if gradient is not None:
                kept = (targets[rows] != IGNORED_TARGET)[:, None]
                part = log_probabilities.exp_()
                part.scatter_add_(1, targets[rows].clamp(min=0)[:, None], -kept.to(wide))
                gradient[rows] = part * kept
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of the negative log-probability of the target.

    Args:
        logits: [T, V] of any floating dtype.
        targets: int64 [T]; positions of target -100 count nothing.

    Returns:
        Scalar in nats, at least float32, differentiable once.
    """
    result: Tensor = _CrossEntropySum.apply(logits, targets)
    return result
