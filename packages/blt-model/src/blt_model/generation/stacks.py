"""One token of one row through a whole stack of blocks in one launch; how it is done is in `stack_kernels`.

Legend: L layers, C places of a cache, H heads, E head width, D width of the stack, K vectors of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from blt_model.caches import AttentionCache
from blt_model.generation.kernels import KINDS
from blt_model.generation.stack_kernels import run_stack
from blt_model.generation.stack_plans import StackPlan, Tuning, plan_stack, usual_tuning
from blt_model.generation.steps import BlockStep


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldedMaps:
    """Folded cross-attentions of one row before every block; see `folding_kernels`."""

    score_map: Tensor
    """[L, 1, H * K, D] contiguous, of the blocks' dtype."""
    output_map: Tensor
    """[L, 1, D, H * K]."""
    vectors: int
    """K."""
    residual: float
    """Times which the state is added."""


class Stack:
    """The blocks of a stack; its weights must stay where they are."""

    def __init__(
        self,
        blocks: Sequence[BlockStep],
        cache: AttentionCache,
        *,
        maps: FoldedMaps | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Lay out the work.

        Args:
            blocks: in order; of one shape.
            cache: of the stack, of one row; may replace its buffers.
            maps: what the blocks read before they begin, if they do; stay where they are.
            tuning: None for what suits the width.
        """
        weight = blocks[0].output
        self._tuning = tuning or usual_tuning(cache.config)
        self._cache, self._blocks, self._maps = cache, list(blocks), maps
        self._eps = blocks[0].attention_norm.eps
        pairs, vectors = (0, 1) if maps is None else (maps.score_map.shape[2], maps.vectors)
        native = not triton.knobs.runtime.interpret
        self._plan: StackPlan = plan_stack(
            cache.config, weight.dtype, KINDS[weight.dtype], self._tuning, pairs=pairs, vectors=vectors, native=native
        )
        pointers = [[matrix.data_ptr() for matrix in _matrices(block)] for block in blocks]
        self._table = torch.tensor(pointers, device=weight.device)
        self.words = torch.zeros(self._plan.size, dtype=torch.int32, device=weight.device)
        self.state = torch.zeros(1, dtype=torch.int32, device=weight.device)

    @property
    def tuning(self) -> Tuning:
        """What was chosen."""
        return self._tuning

    @property
    def plan(self) -> StackPlan:
        """How the work is shared out."""
        return self._plan

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Run one token.

        Args:
            x: [1, D] contiguous.
            positions: int64 [1] of the token.

        Returns:
            [1, D] of the weights' dtype.
        """
        out = torch.empty((1, self._plan.dim), dtype=self._blocks[0].output.dtype, device=x.device)
        self.launch(x, out, positions, self._plan.programs, 0)
        return out

    def launch(self, x: Tensor, out: Tensor, positions: Tensor, programs: int, first_program: int) -> None:
        """Launch some of the programs; what `__call__` does with all of them.

        Args:
            x: [1, D].
            out: [1, D] to write to.
            positions: int64 [1].
            programs: how many.
            first_program: the first of them.
        """
        cache, plan, maps, tuning = self._cache, self._plan, self._maps, self._tuning
        options: dict[str, Any] = {} if tuning.registers is None else {"maxnreg": tuning.registers}
        if tuning.cooperative:
            options["launch_cooperative_grid"] = True
        # Pointers that are not read still have to be some.
        run_stack[(programs,)](
            x,
            out,
            self.words,
            self.state,
            self._table,
            cache.keys,
            cache.values,
            torch.view_as_real(cache.rotary.table),
            positions,
            self.words if maps is None else maps.score_map.view(torch.int32),
            x if maps is None else maps.output_map,
            first_program,
            len(self._blocks),
            cache.capacity,
            cache.keys.stride(0),
            self._eps,
            plan.width**-0.5,
            1.0 if maps is None else maps.residual,
            P=plan,
            num_warps=tuning.warps,
            num_stages=1,
            **options,
        )


def _matrices(block: BlockStep) -> tuple[Tensor, ...]:
    """In the order in which the kernel expects them."""
    return (
        block.attention_norm.weight,
        block.query_key_value,
        block.feed_forward_norm.weight,
        block.output,
        block.gate_value,
        block.feed_forward_output,
    )
