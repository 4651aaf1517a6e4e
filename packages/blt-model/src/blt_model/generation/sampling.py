"""Choosing the next token of every row at once, each by its own options and its own random numbers.

Legend: B rows, n rows in use, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np
import torch
from torch import Tensor

from blt_model.generation import fused
from blt_model.generation.requests import SamplingOptions
from blt_model.vocabulary import BYTE_OFFSET, EOS_ID, VOCABULARY_SIZE

_BLOCK = 256
"""Random numbers drawn at once."""


class _Uniforms:
    """Random numbers of one seed, in [0, 1); the same on every device and whatever else is drawn."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._block: list[float] = []

    def draw(self) -> float:
        if not self._block:
            self._block = self._generator.random(_BLOCK).tolist()[::-1]
        return self._block.pop()


class Sampler:
    """The rows' options, as tensors beside the logits."""

    def __init__(self, rows: int, device: torch.device) -> None:
        """Make room for so many rows."""
        self._device = device
        self._options = [SamplingOptions()] * rows
        self._uniforms = [_Uniforms(0)] * rows
        # Float64 columns: temperature, top_k, top_p, min_p, penalty.
        self._table = torch.zeros(rows, 5, dtype=torch.float64)
        self._on_device = self._table.to(device)
        self._seen = torch.zeros(rows, VOCABULARY_SIZE, dtype=torch.bool, device=device)
        self._forbidden = torch.zeros(VOCABULARY_SIZE, dtype=torch.float64)
        self._forbidden[:BYTE_OFFSET] = -torch.inf
        self._forbidden[EOS_ID] = 0
        self._forbidden = self._forbidden.to(device)

    def begin(self, row: int, options: SamplingOptions, prompt: Iterable[int]) -> None:
        """Begin a text in a row.

        Args:
            row: which.
            options: of the text.
            prompt: its token ids so far.
        """
        self._options[row], self._uniforms[row] = options, _Uniforms(options.seed)
        values = (
            options.temperature or 1.0,
            VOCABULARY_SIZE if options.top_k is None else options.top_k,
            1.0 if options.top_p is None else options.top_p,
            0.0 if options.min_p is None else options.min_p,
            options.repetition_penalty,
        )
        self._table[row] = torch.tensor(values, dtype=torch.float64)
        self._on_device[row] = self._table[row].to(self._device)
        self._seen[row] = False
        if options.repetition_penalty != 1:
            self._seen[row, torch.tensor(sorted(set(prompt)), dtype=torch.int64, device=self._device)] = True

    def move_row(self, source: int, target: int) -> None:
        """Put a row in another's place."""
        self._options[target], self._uniforms[target] = self._options[source], self._uniforms[source]
        for tensor in (self._table, self._on_device, self._seen):
            tensor[target] = tensor[source]

    def plan_single(self) -> tuple[Hashable, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] | None:
        """How the one row chooses, for `SingleRowSession.start`; None where a choice depends on earlier ones."""
        options = self._options[0]
        if options.repetition_penalty != 1:
            return None
        if options.temperature == 0:
            return "likeliest", lambda logits, uniform: self._single(logits, None)
        return "drawn", self._single

    def draw_single(self) -> float:
        """The random number of the one row's next choice."""
        return self._uniforms[0].draw() if self._options[0].temperature > 0 else 0.0

    def _single(self, logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        if uniform is None and fused.can_choose(logits):
            return fused.likeliest(logits, BYTE_OFFSET, EOS_ID)
        scores = logits.double()
        log_probabilities = torch.log_softmax(scores, dim=-1)
        scores = scores + self._forbidden
        tokens = scores.argmax(dim=-1) if uniform is None else draw_tokens(scores, self._on_device[:1], uniform)
        return tokens, log_probabilities.gather(1, tokens[:, None]).squeeze(1)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Choose among bytes and EOS.

        Args:
            logits: [n, V] of the first n rows.

        Returns:
            Token ids int64 [n], and their log-probabilities float64 [n] under the logits alone.
        """
        count = len(logits)
        options = self._options[:count]
        scores = logits.double()
        log_probabilities = torch.log_softmax(scores, dim=-1)
        scores = scores + self._forbidden
        penalised = any(option.repetition_penalty != 1 for option in options)
        if penalised:
            penalty = self._on_device[:count, 4:5]
            changed = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen[:count], changed, scores)
        tokens = scores.argmax(dim=-1)
        drawing = [option.temperature > 0 for option in options]
        if any(drawing):
            uniforms = [row.draw() if draws else 0.0 for row, draws in zip(self._uniforms, drawing, strict=False)]
            chosen = torch.tensor([uniforms, drawing], dtype=torch.float64).to(self._device)
            drawn = draw_tokens(scores, self._on_device[:count], chosen[0])
            tokens = torch.where(chosen[1] > 0, drawn, tokens)
        if penalised:
            self._seen[torch.arange(count, device=self._device), tokens] = True
        return tokens, log_probabilities.gather(1, tokens[:, None]).squeeze(1)


def draw_tokens(scores: Tensor, options: Tensor, uniforms: Tensor) -> Tensor:
    """Draw by temperature, top_k, top_p and min_p, in this order.

    Args:
        scores: float64 [n, V], -inf where a token is forbidden.
        options: float64 [n, at least 4]: temperature, top_k (V or more for all), top_p (1 for all), min_p (0 for all).
        uniforms: float64 [n] in [0, 1).

    Returns:
        int64 [n] token ids.
    """
    temperature, top_k, top_p, min_p = options[:, :4, None].unbind(1)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    # Shifted first, so that a tiny temperature overflows towards -inf only.
    probabilities = torch.softmax((ordered - ordered[:, :1]) / temperature, dim=-1)
    probabilities = probabilities * (torch.arange(scores.shape[1], device=scores.device) < top_k)
    mass = probabilities.cumsum(-1)
    reached = top_p * mass[:, -1:]
    keep = ((mass - probabilities < reached) | (top_p >= 1)) & (probabilities >= min_p * probabilities[:, :1])
    mass = (probabilities * keep).cumsum(-1)
    # The first place whose mass exceeds the draw; a forbidden token adds no mass and is never the first to exceed it.
    places = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
    return order.gather(1, places).squeeze(1)
