"""Steps whose loss or gradient is not finite: left out, counted, and too many in a row end the run.

A single one happens in long runs (a batch of odd documents, an overflow in low precision) and costs one batch; many in
a row mean that the weights are beyond help, and that an earlier checkpoint is worth more than more of the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class NonfiniteSteps:
    """How many steps were left out; equal on all ranks, and part of a checkpoint."""

    total: int = 0
    """Since the beginning of the run."""

    in_row: int = 0
    """Since the last sound step."""

    def after(self, *, is_broken: bool) -> NonfiniteSteps:
        """Return the counts after one more step.

        Args:
            is_broken: whether it was left out.
        """
        if not is_broken:
            return NonfiniteSteps(total=self.total)
        return NonfiniteSteps(total=self.total + 1, in_row=self.in_row + 1)
