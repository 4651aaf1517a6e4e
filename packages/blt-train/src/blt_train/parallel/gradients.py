"""The global norm of gradients that are spread over ranks, and clipping to it.

Norms travel as a sum of squares, one float64 per rank, so that they can share the step's only exchange with the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from blt_train.parallel.rows import local_rows, rows_of

_SMALLEST = 1e-6


@torch.no_grad()
def square_sum(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return this rank's share of the sum of the squares of all gradients.

    Args:
        parameters: of the model, sharded.
        device: for the result.

    Returns:
        float64 scalar; summed over all ranks it is the square of the global norm.
    """
    # Of several copies one counts.
    parts = [
        local_rows(parameter.grad)
        for parameter in parameters
        if parameter.grad is not None and rows_of(parameter).is_first_copy
    ]
    parts = [part for part in parts if part.numel()]
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(parts)).double().square().sum()


@torch.no_grad()
def clip_whole(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Clip the gradients of a plain model; they are read once more and written only where they are too large.

    Args:
        parameters: of the model.
        largest: what the global norm may be.

    Returns:
        The norm before. Gradients whose norm is not finite stay as they are.
    """
    having = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in having if parameter.grad is not None])
    value = float(norm)
    if math.isfinite(value) and value + _SMALLEST >= largest:
        nn.utils.clip_grads_with_norm_(having, largest, norm)
    return value


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], norm: float, largest: float) -> None:
    """Scale gradients so that their global norm is at most `largest`, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: of the model.
        norm: global norm of the gradients.
        largest: what it may be.
    """
    factor = min(1.0, largest / (norm + _SMALLEST))
    parts = [local_rows(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if factor < 1.0 and parts:
        torch._foreach_mul_(parts, factor)
