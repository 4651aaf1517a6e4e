"""A ByteLM one token at a time: the entropy model of a BLT, or a model that generates by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.byte_lm import ByteLM
from blt_model.caches import AttentionCache, AttentionStep, CacheFiller
from blt_model.generation import fused
from blt_model.generation.prefill import PackedTexts
from blt_model.generation.resident import Parts
from blt_model.generation.steps import BlockStep, block_steps

Ints = npt.NDArray[np.int64]


class ByteLMSteps:
    """The model's cache, its positions and its step."""

    def __init__(self, model: ByteLM, rows: int, *, context_start: int | None = None, is_fused: bool = False) -> None:
        """Make room.

        Args:
            model: whose weights are used as they lie.
            rows: texts at once.
            context_start: the token that begins a context of its own, as every text does; None for none.
            is_fused: run the kernels of `fused`, which must be available, from static plans only.
        """
        weight = model.embedding.weight
        self.model, self.context_start = model, context_start
        self.cache = AttentionCache(model.config.transformer, rows, dtype=weight.dtype, device=weight.device)
        self.positions: Ints = np.zeros(rows, dtype=np.int64)
        """int64 [rows] of the next token in its context, unless that token begins one."""
        self._embedding = weight
        self._is_fused = is_fused
        blocks = block_steps(model.blocks)
        self._blocks: Sequence[BlockStep | fused.FusedBlock] = fused.block_steps(blocks) if is_fused else blocks
        self._stack = fused.resident_stack(Parts(blocks=blocks, caches=[self.cache])) if is_fused else None

    def filler(self, first_row: int, texts: PackedTexts) -> CacheFiller:
        """What takes the keys and values of texts (the first in first_row) as they are run; sets their positions."""
        contexts = texts.contexts(self.context_start)
        last = np.searchsorted(contexts.starts, texts.ends, side="left") - 1
        lengths = contexts.lengths[last]
        self.positions[first_row : first_row + len(lengths)] = lengths
        return CacheFiller(self.cache, first_row, contexts.starts[last], lengths)

    def plan(self, tokens: Tensor) -> AttentionStep:
        """Plan the step of a token of each of the first n rows, int64 [n], from positions on the host."""
        positions = self.positions[: len(tokens)]
        if self.context_start is not None:
            positions = np.where(tokens.numpy(force=True) == self.context_start, 0, positions)
        return self.cache.plan(positions)

    @property
    def is_resident(self) -> bool:
        """Whether the blocks run in one launch."""
        return self._stack is not None

    @property
    def embedding(self) -> Tensor:
        """[V, dim] what a step begins with."""
        return self._embedding

    def plan_static(
        self, tokens: Tensor, positions: Tensor, programs: int = 0, skipped: Tensor | None = None
    ) -> AttentionStep | fused.FusedStep:
        """Plan the same from positions on the device, int64 [n]; for programs and skipped see `FusedStep`."""
        if self.context_start is not None:
            positions = torch.where(tokens == self.context_start, 0, positions)
        if self._is_fused:
            return fused.FusedStep(positions, None, programs, skipped)
        return self.cache.plan_static(positions, None, self.cache.capacity)

    def step(self, tokens: Tensor, step: AttentionStep | fused.FusedStep, x: Tensor | None = None) -> Tensor:
        """Run one token of each of the first n rows.

        Args:
            tokens: int64 [n].
            step: the plan.
            x: [n, dim] the tokens' rows of the embedding, where they have been read; None where they have not.

        Returns:
            [n, dim] the trunk's output.
        """
        if x is None:
            x = F.embedding(tokens, self._embedding)
        if self._stack is not None and isinstance(step, fused.FusedStep):
            return self._stack(x, step.positions, step.programs, skipped=step.skipped)
        for layer, block in enumerate(self._blocks):
            x = block(x, self.cache, layer, step)  # type: ignore[arg-type]  # blocks and plans are of one kind
        return x

    def advance(self, tokens: Sequence[int]) -> None:
        """Count a token of each of the first n rows, now that the host knows them."""
        positions = self.positions[: len(tokens)]
        if self.context_start is not None:
            positions[np.array(tokens) == self.context_start] = 0
        positions += 1

    def copy_row(self, source: int, target: int) -> None:
        """Copy a row over another."""
        self.cache.copy_row(source, target, int(self.positions[source]))
        self.positions[target] = self.positions[source]


class StepNumbers:
    """Small numbers that a step needs for every row, as one array on the host and one on the device.

    The device's array stays where it is, so that captured graphs can read it.
    """

    def __init__(self, fields: int, rows: int, device: torch.device) -> None:
        """Make room for so many numbers of each row."""
        pinned = device.type == "cuda"
        self._staging = torch.zeros(fields, rows, dtype=torch.int64, pin_memory=pinned)
        self.host: Ints = self._staging.numpy()
        """int64 [fields, rows]."""
        self.device = torch.zeros(fields, rows, dtype=torch.int64, device=device)
        """int64 [fields, rows], as of the last upload."""

    def upload(self) -> None:
        """Copy the host's numbers to the device; the host may change them once the device has been waited for."""
        self.device.copy_(self._staging, non_blocking=True)
