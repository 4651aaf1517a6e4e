"""How far an optimizer step moves the weights: the norm of their change, whatever the optimizer.

The weights are copied before the update and compared after it. The copy lives during the update alone, when no
activation does, so it seldom raises the peak of memory; it reads and writes each weight a few times, as the optimizer
does. Sharded weights are compared shard by shard, and one number per rank is summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from blt_train.parallel.rows import local_rows, rows_of
from blt_train.runtime import Runtime


class UpdateNorm:
    """Measures one update: made before it, asked after it."""

    def __init__(self, parameters: Iterable[nn.Parameter], runtime: Runtime) -> None:
        """Copy this rank's part of the weights.

        Args:
            parameters: all that the update may move; where there are several ranks, DTensors on all of them.
            runtime: this process's place.
        """
        # Of several copies one counts; an empty shard has nothing to count.
        own = [local_rows(parameter.detach()) for parameter in parameters if rows_of(parameter).is_first_copy]
        self._weights = [weight for weight in own if weight.numel()]
        self._before = [weight.clone() for weight in self._weights]
        self._runtime = runtime

    @torch.no_grad()
    def norm(self) -> float:
        """Return the 2-norm of the change of all weights since; every rank calls it, once, and gets the same number."""
        squares = torch.zeros((), dtype=torch.float64, device=self._runtime.device)
        if self._weights:
            torch._foreach_sub_(self._before, self._weights)
            squares = torch.stack(torch._foreach_norm(self._before)).double().square().sum()
        self._before = []
        return math.sqrt(self._runtime.sum(squares.reshape(1))[0])
