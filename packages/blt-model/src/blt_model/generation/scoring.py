"""How probable given continuations are: what evaluation by likelihood asks of a model.

A continuation whose prompt nobody shares is scored in one packed forward. Where several continue the same prompt, the
prompt runs once; its row is copied, and the continuations go on from there byte by byte, side by side.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.errors import ModelError
from blt_model.generation.patching import NewPatcher, push_all
from blt_model.generation.prefill import (
    PackedTexts,
    TextPatches,
    entropies_of,
    prefill_blt,
    prefill_byte_lm,
)
from blt_model.generation.session import Session
from blt_model.vocabulary import BYTE_OFFSET, EOS_ID

Ints = npt.NDArray[np.int64]

STEP_TOKENS = 128
"""Positions of a packed forward that take about as long as one step; decides whether sharing a prompt saves time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How probable a continuation is after its prompt."""

    log_probabilities: tuple[float, ...]
    """Of every byte of the continuation, in nats, and of the end of the document where that was asked for."""
    is_greedy: bool
    """Whether the likeliest choice would have given the continuation, at every byte."""

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation, in nats."""
        return math.fsum(self.log_probabilities)


@dataclass(frozen=True, slots=True)
class Item:
    """One continuation."""

    index: int
    prompt: list[int]
    """Token ids, BOS first."""
    targets: list[int]
    """Token ids to score, at least one."""

    @property
    def inputs(self) -> list[int]:
        """What the model reads to predict all targets."""
        return [*self.prompt, *self.targets[:-1]]


def targets_of(continuation: bytes, with_end: bool) -> list[int]:
    """The token ids of a continuation, and EOS if its being the end of the document is scored too."""
    return [*(byte + BYTE_OFFSET for byte in continuation), *([EOS_ID] if with_end else [])]


@dataclass(frozen=True, slots=True)
class PackedScorer:
    """Scores continuations in packed forwards, prompts and all."""

    model: BLT | ByteLM
    new_patcher: NewPatcher | None
    entropy_model: ByteLM | None
    context_start: int | None
    """The token that begins a context of the entropy model's own; None for none."""
    max_tokens: int
    """Tokens of a forward, unless one text alone holds more."""

    def score(self, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
        """Score all; yields the number of each and its score."""
        batch: list[Item] = []
        tokens = 0
        for item in items:
            length = len(item.prompt) + len(item.targets)
            if batch and tokens + length > self.max_tokens:
                yield from self._score(batch)
                batch, tokens = [], 0
            batch.append(item)
            tokens += length
        if batch:
            yield from self._score(batch)

    def _score(self, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
        device = next(self.model.parameters()).device
        texts = PackedTexts.pack([item.inputs for item in items], device)
        wanted = np.concatenate(
            [np.arange(end - len(item.targets), end) for item, end in zip(items, texts.ends, strict=True)]
        )
        logits = self._logits(texts, [item.inputs for item in items], wanted)
        targets = torch.tensor([target for item in items for target in item.targets], device=device)
        log_probabilities, greedy = judge(logits, targets)
        place = 0
        for item in items:
            part = slice(place, place + len(item.targets))
            yield item.index, Score(log_probabilities=tuple(log_probabilities[part]), is_greedy=all(greedy[part]))
            place = part.stop

    def _logits(self, texts: PackedTexts, tokens: Sequence[Sequence[int]], wanted: Ints) -> Tensor:
        if isinstance(self.model, ByteLM):
            states = prefill_byte_lm(self.model, texts, None)
            logits: Tensor = self.model.head(self.model.norm(states[torch.from_numpy(wanted).to(states.device)]))
            return logits
        if self.new_patcher is None:
            raise ModelError("a blt reads patch by patch; give new_patcher, the patch scheme of its training.")
        entropies = [math.nan] * len(texts.tokens)
        if self.entropy_model is not None:
            entropies = entropies_of(self.entropy_model, texts, self.context_start, None)
        starts = [
            push_all(self.new_patcher(), text, entropies[begin : begin + len(text)])
            for text, begin in zip(tokens, texts.starts, strict=True)
        ]
        return prefill_blt(self.model, texts, TextPatches.of(starts), wanted, None)


def judge(logits: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Log-probabilities of targets, and whether each is the likeliest byte or EOS.

    Args:
        logits: [N, V].
        targets: int64 [N].
    """
    log_probabilities = torch.log_softmax(logits.double(), dim=-1)
    allowed = log_probabilities.clone()
    allowed[:, :BYTE_OFFSET] = -torch.inf
    allowed[:, EOS_ID] = log_probabilities[:, EOS_ID]
    taken: list[float] = log_probabilities.gather(1, targets[:, None]).squeeze(1).tolist()
    greedy: list[bool] = (allowed.argmax(-1) == targets).tolist()
    return taken, greedy


def sharing_pays(items: Sequence[Item]) -> bool:
    """Whether continuations of one prompt are scored sooner step by step than in one packed forward.

    Args:
        items: with equal prompts.
    """
    saved = (len(items) - 1) * len(items[0].prompt)
    return saved > STEP_TOKENS * max(len(item.targets) for item in items)


def score_shared(session: Session, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
    """Score continuations of one prompt, which runs once for as many of them as the session has rows.

    Args:
        session: whose rows are free.
        items: with equal prompts.

    Yields:
        The number of each and its score.
    """
    ordered = sorted(items, key=lambda item: len(item.targets), reverse=True)
    for begin in range(0, len(ordered), session.rows):
        # The longest first: those under way stay the first rows.
        batch = ordered[begin : begin + session.rows]
        logits = session.admit(0, [batch[0].prompt])
        for row in range(1, len(batch)):
            session.fork_row(0, row)
        yield from _score_rows(session, batch, logits.expand(len(batch), -1))


def _score_rows(session: Session, batch: Sequence[Item], logits: Tensor) -> Iterator[tuple[int, Score]]:
    taken: list[list[float]] = [[] for _ in batch]
    greedy = [True] * len(batch)
    for step in range(len(batch[0].targets)):
        tokens = [item.targets[step] for item in batch if step < len(item.targets)]
        count = len(tokens)
        targets = torch.tensor(tokens, device=session.device)
        for row, (log_probability, likeliest) in enumerate(zip(*judge(logits[:count], targets), strict=True)):
            taken[row].append(log_probability)
            greedy[row] &= likeliest
        going = sum(step + 1 < len(item.targets) for item in batch)
        if going:
            entropies = session.encode(targets[:going])
            values = None if entropies is None else entropies.tolist()
            logits = session.decode(tokens[:going], values, [True] * going)
    for item, log_probabilities, likeliest in zip(batch, taken, greedy, strict=True):
        yield item.index, Score(log_probabilities=tuple(log_probabilities), is_greedy=likeliest)
