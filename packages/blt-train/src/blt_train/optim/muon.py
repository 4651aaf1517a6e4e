"""Muon for the linear maps between hidden states, fused AdamW for everything else, as one optimizer.

Muon moves a matrix by its momentum with all singular values made (nearly) one, found by a few Newton-Schulz iterations
in bfloat16 (K. Jordan et al., 2024). The update is scaled to the size of AdamW's (J. Liu et al., "Muon is scalable for
LLM training", 2025), so that learning rate and weight decay of AdamW serve both. Where a parameter holds several
matrices one below the other (query, key, value; gate, value), each is made orthogonal on its own.

The iterations need whole matrices. Of parameters that FSDP2 shards by rows, the ranks of a shard group take one each:
its rows are sent to the rank that owns it, and its update is sent back, one all-to-all each way, in bfloat16. So every
matrix is worked on once, communication is twice the parameters' bfloat16 size, and no rank holds more than the few
matrices of a round. Replicas (HSDP) do the same work each, as they hold the same numbers.

Legend: R rows, C columns, W ranks of a shard group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blt_train.optim.groups import Role
from blt_train.parallel.rows import ShardGroup, local_rows, shard_group

#: Coefficients of the iteration x <- a x + (b g + c g^2) x, g = x x^T, by K. Jordan: the steepest rise from 0 whose
#: values stay near 1 (between 0.7 and 1.2).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
#: Below this norm a momentum is treated as if it had it.
_SMALLEST_NORM = 1e-7
#: Root mean square of AdamW's updates in units of the learning rate, as measured by Liu et al.
_ADAMW_RMS = 0.2


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """Return a matrix with (nearly) the same singular vectors and singular values between 0.7 and 1.2.

    Args:
        matrix: [R, C] of any floating dtype.
        iterations: Newton-Schulz iterations; 5 suffice.

    Returns:
        bfloat16 [R, C].
    """
    a, b, c = COEFFICIENTS
    half = matrix.bfloat16()
    # The Gram matrix of the shorter side is the smaller one.
    wide = half if half.shape[0] <= half.shape[1] else half.mT
    x = wide / wide.float().norm().clamp(min=_SMALLEST_NORM).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x if wide is half else x.mT.contiguous()
    return result


def muon_direction(momentum: Tensor, sections: Sequence[int], iterations: int) -> Tensor:
    """Return the update of a parameter, to be multiplied by the learning rate.

    Args:
        momentum: [R, C].
        sections: rows of the matrices in it, with sum R.
        iterations: of `orthogonalize`.

    Returns:
        bfloat16 [R, C], its root mean square about that of AdamW's updates.
    """
    parts = [
        orthogonalize(part, iterations) * (_ADAMW_RMS * math.sqrt(max(part.shape)))
        for part in torch.split(momentum, list(sections))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A parameter that Muon takes, in one step."""

    parameter: Tensor
    """This rank's rows."""
    gradient: Tensor
    """This rank's rows."""
    momentum: Tensor
    """This rank's rows, the gradient taken in."""
    decay: float
    """Of the momentum."""
    columns: int
    sections: tuple[int, ...]
    rows: ShardGroup | None
    """Which rank has which rows; None for a whole matrix."""

    def ahead(self) -> Tensor:
        """Nesterov's momentum, one gradient ahead, in bfloat16: this rank's rows of what is made orthogonal."""
        return self.gradient.lerp(self.momentum, self.decay).bfloat16()


class Muon(torch.optim.Optimizer):
    """Muon over the groups of role `matrix`, AdamW over the others."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, object]],
        *,
        lr: float,
        momentum: float,
        iterations: int,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Take the parameters.

        Args:
            groups: what `parameter_groups` gives.
            lr: learning rate of both.
            momentum: decay of Muon's momentum, which is Nesterov's.
            iterations: Newton-Schulz iterations.
            betas: AdamW's.
            eps: AdamW's.
        """
        self._iterations = iterations
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__([dict(group) for group in groups], defaults)
        # AdamW completes its groups with its own defaults; they stay groups of this optimizer, which owns all state.
        self._adamw = torch.optim.AdamW(self._other_groups(), lr=lr, betas=betas, eps=eps, fused=True)

    def _other_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["role"] != Role.MATRIX]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Move all parameters that have a gradient.

        Args:
            closure: computes the loss anew; as with torch's optimizers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["role"] == Role.MATRIX:
                self._step_matrices(group)
        # Loading a state replaces both, so they are handed over each time.
        self._adamw.param_groups, self._adamw.state = self._other_groups(), self.state
        self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Move the matrices of a group."""
        rate, decay = group["lr"], group["weight_decay"]
        matrices = [
            self._advance(parameter, sections, group["momentum"])
            for parameter, sections in zip(group["params"], group["sections"], strict=True)
            if parameter.grad is not None
        ]
        for matrix, direction in _directions(matrices, self._iterations):
            matrix.parameter.mul_(1 - rate * decay)
            matrix.parameter.add_(direction, alpha=-rate)

    def _advance(self, parameter: nn.Parameter, sections: tuple[int, ...], decay: float) -> _Matrix:
        """Take the gradient into the momentum."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        if parameter.grad is None:
            raise RuntimeError("a matrix without gradient has no update")
        gradient, momentum = local_rows(parameter.grad), local_rows(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - decay)
        return _Matrix(
            parameter=local_rows(parameter),
            gradient=gradient,
            momentum=momentum,
            decay=decay,
            columns=parameter.shape[1],
            sections=sections,
            rows=shard_group(parameter),
        )


def _directions(matrices: Sequence[_Matrix], iterations: int) -> Iterator[tuple[_Matrix, Tensor]]:
    """Yield every matrix with this rank's rows of its update."""
    for matrix in matrices:
        if matrix.rows is None:
            yield matrix, muon_direction(matrix.ahead(), matrix.sections, iterations)
    # Those of a round should be of one size, or ranks wait for the one that has the largest.
    sharded = [matrix for matrix in matrices if matrix.rows is not None]
    sharded.sort(key=lambda matrix: sum(matrix.sections) * matrix.columns, reverse=True)
    while sharded:
        width = len(sharded[0].rows.counts) if sharded[0].rows is not None else 1
        yield from _round(sharded[:width], iterations)
        del sharded[:width]


def _round(matrices: Sequence[_Matrix], iterations: int) -> Iterator[tuple[_Matrix, Tensor]]:
    """One matrix for each rank of the shard group, as far as there are any: rank i owns matrix i."""
    layout = matrices[0].rows
    if layout is None:
        raise RuntimeError("the matrices of a round are sharded")
    own = matrices[layout.rank] if layout.rank < len(matrices) else None
    # What each rank holds of each matrix, in numbers.
    shares = [
        [count * matrix.columns for count in matrix.rows.counts] if matrix.rows is not None else []
        for matrix in matrices
    ]
    absent = [0] * (len(layout.counts) - len(matrices))
    there = [share[layout.rank] for share in shares] + absent
    here = shares[layout.rank] if own is not None else [0] * len(layout.counts)
    sent = torch.cat([matrix.ahead().flatten() for matrix in matrices])
    whole = _exchange(sent, there, here, layout)
    if own is not None:
        whole = muon_direction(whole.view(-1, own.columns), own.sections, iterations).flatten()
    parts = torch.split(_exchange(whole, here, there, layout), there)
    for matrix, part in zip(matrices, parts[: len(matrices)], strict=True):
        yield matrix, part.view(-1, matrix.columns)


def _exchange(sent: Tensor, sizes: Sequence[int], expected: Sequence[int], layout: ShardGroup) -> Tensor:
    """Send bfloat16 numbers to the ranks of a shard group, and receive theirs.

    Args:
        sent: what goes to rank 0, to rank 1, and so on, end to end.
        sizes: numbers for each rank.
        expected: numbers from each rank.
        layout: names the group.
    """
    received = sent.new_empty(sum(expected))
    # Not every backend knows bfloat16 here; all know bytes.
    dist.all_to_all_single(
        received.view(torch.uint8),
        sent.view(torch.uint8),
        [2 * size for size in expected],
        [2 * size for size in sizes],
        group=layout.group,
    )
    return received
