"""Generation by recomputation: every new byte runs the whole prefix again.

Slow on purpose: this is what the model says by definition, and what any cached generation has to equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM, next_byte_entropy
from blt_model.errors import ModelError
from blt_model.generation.patching import NextPatch
from blt_model.packed import PackedBatch
from blt_model.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, VOCABULARY_SIZE


def generate_uncached(
    model: BLT | ByteLM,
    prompt: bytes,
    *,
    next_patch: NextPatch | None = None,
    entropy_model: ByteLM | None = None,
    max_new_bytes: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Continue a document.

    Args:
        model: what predicts.
        prompt: the document so far; may be empty.
        next_patch: the patch scheme; needed for BLT, not read for ByteLM.
        entropy_model: gives next_patch its entropies; None for schemes that need none.
        max_new_bytes: the most bytes to give.
        temperature: divides the logits before sampling; 0 takes the likeliest byte.
        top_k: sample among the k likeliest only.
        seed: of the sampling.

    Yields:
        Byte values, 0 to 255, until the model ends the document or max_new_bytes are given.

    Raises:
        ModelError: BLT without next_patch, or a bad temperature, top_k or max_new_bytes.
    """
    if isinstance(model, BLT) and next_patch is None:
        raise ModelError("a blt generates patch by patch; give next_patch, the patch scheme of its training.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ModelError(f"temperature is {temperature}; give 0 for the likeliest byte, or a positive number.")
    if top_k is not None and top_k < 1:
        raise ModelError(f"top_k is {top_k}; give at least 1, or none.")
    if max_new_bytes < 0:
        raise ModelError(f"max_new_bytes is {max_new_bytes}; it must not be negative.")
    return _generate(model, prompt, next_patch, entropy_model, max_new_bytes, _Sampler(temperature, top_k, seed))


class _Sampler:
    """Draws a token among bytes and EOS; on the CPU, so that a seed means the same on every device."""

    def __init__(self, temperature: float, top_k: int | None, seed: int) -> None:
        self.temperature, self.top_k = temperature, top_k
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, logits: Tensor) -> int:
        """A token id from logits [V]."""
        scores = logits.detach().double().cpu()
        allowed = torch.zeros(VOCABULARY_SIZE, dtype=torch.bool)
        allowed[EOS_ID] = True
        allowed[BYTE_OFFSET:] = True
        scores = scores.masked_fill(~allowed, -torch.inf)
        if self.temperature == 0:
            return int(scores.argmax())
        if self.top_k is not None:
            kept = scores.topk(min(self.top_k, int(allowed.sum()))).indices
            scores = torch.full_like(scores, -torch.inf).scatter(0, kept, scores[kept])
        probabilities = torch.softmax(scores / self.temperature, dim=0)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


class _Boundaries:
    """Where patches start in a growing prefix, the place after its last token included."""

    def __init__(self, next_patch: NextPatch, entropy_model: ByteLM | None) -> None:
        self.next_patch, self.entropy_model = next_patch, entropy_model
        self.starts = [True]
        next_patch.reset()

    def extend(self, tokens: list[int]) -> None:
        """Take the tokens of the prefix that are new since the last call."""
        known = len(self.starts) - 1
        new = tokens[known:]
        if self.entropy_model is None:
            entropies = [math.nan] * len(new)
        else:
            batch = _byte_batch(tokens, self.entropy_model)
            entropies = next_byte_entropy(self.entropy_model(batch))[known:].tolist()
        for token, entropy in zip(new, entropies, strict=True):
            self.starts.append(self.next_patch.push(token, entropy))


def _byte_batch(tokens: list[int], model: BLT | ByteLM) -> PackedBatch:
    device = next(model.parameters()).device
    offsets = torch.tensor([0, len(tokens)], dtype=torch.int32, device=device)
    return PackedBatch(torch.tensor(tokens, device=device), offsets)


def _patched_batch(tokens: list[int], starts: list[bool], model: BLT) -> PackedBatch:
    batch = _byte_batch(tokens, model)
    device = batch.tokens.device
    places = [place for place, start in enumerate(starts[:-1]) if start]
    patch = torch.tensor(starts, device=device).cumsum(0) - 1
    return PackedBatch(
        batch.tokens,
        batch.document_offsets,
        patch_offsets=torch.tensor([*places, len(tokens)], dtype=torch.int32, device=device),
        decoder_patch=patch[1:] - 1,
    )


@torch.no_grad()
def _last_logits(model: BLT | ByteLM, tokens: list[int], boundaries: _Boundaries | None) -> Tensor:
    if isinstance(model, ByteLM) or boundaries is None:
        logits: Tensor = model(_byte_batch(tokens, model))
        return logits[-1]
    boundaries.extend(tokens)
    patched: Tensor = model(_patched_batch(tokens, boundaries.starts, model))
    return patched[-1]


def _generate(
    model: BLT | ByteLM,
    prompt: bytes,
    next_patch: NextPatch | None,
    entropy_model: ByteLM | None,
    max_new_bytes: int,
    sampler: _Sampler,
) -> Iterator[int]:
    tokens = [BOS_ID, *(byte + BYTE_OFFSET for byte in prompt)]
    boundaries = None if next_patch is None or isinstance(model, ByteLM) else _Boundaries(next_patch, entropy_model)
    for _ in range(max_new_bytes):
        token = sampler.draw(_last_logits(model, tokens, boundaries))
        if token == EOS_ID:
            return
        tokens.append(token)
        yield token - BYTE_OFFSET
