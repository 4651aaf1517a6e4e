"""A ByteLM one token at a time: the entropy model of a BLT, or a model that generates by itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.byte_lm import ByteLM
from blt_model.caches import AttentionCache, AttentionStep, CacheFiller
from blt_model.generation.prefill import PackedTexts, prefill_byte_lm
from blt_model.generation.steps import Norm, block_steps

Ints = npt.NDArray[np.int64]


class ByteLMSteps:
    """The model's cache and its step."""

    def __init__(self, model: ByteLM, rows: int) -> None:
        """Make room.

        Args:
            model: whose weights are used as they lie.
            rows: texts at once.
        """
        weight = model.embedding.weight
        self.model = model
        self.cache = AttentionCache(model.config.transformer, rows, dtype=weight.dtype, device=weight.device)
        self._embedding, self._head = weight, model.head.weight
        self._blocks, self._norm = block_steps(model.blocks), Norm.of(model.norm)

    def admit(self, first_row: int, texts: PackedTexts) -> Tensor:
        """Begin rows with texts, the first in first_row.

        Returns:
            [T, dim] states, from which `byte_lm_logits` makes logits.
        """
        filler = CacheFiller(self.cache, first_row, texts.host_offsets)
        return prefill_byte_lm(self.model, texts, filler)

    def step(self, tokens: Tensor, step: AttentionStep) -> Tensor:
        """Run one token of each of the first n rows.

        Args:
            tokens: int64 [n].
            step: planned on this object's cache.

        Returns:
            Logits [n, V].
        """
        x = F.embedding(tokens, self._embedding)
        for layer, block in enumerate(self._blocks):
            x = block(x, self.cache, layer, step)
        return F.linear(self._norm(x), self._head)


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
