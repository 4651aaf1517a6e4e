"""Texts in many scripts: ours against transformers, cached generation against recomputation, batches against single.

Weights are fresh in every run; the seed is printed, and BLT_TEST_SEED runs it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from tests.blt_model.generation_oracle import fresh_blt, fresh_byte_lm, fresh_seed
from tests.blt_model.multilingual import TEXTS
from tests.blt_model.test_transformers import assert_close, their_logits
from tests.blt_model.transformers_map import blt_weights, byte_lm_weights, their_blt, their_patcher
from torch.nn.functional import cross_entropy

from blt_data import frame
from blt_model import (
    BLT,
    ByteLM,
    Completion,
    Generator,
    Request,
    cross_entropy_sum,
    next_byte_entropy,
    pack_documents,
    preset,
)
from blt_model.generation.reference import generate_uncached
from blt_patcher import EntropyScheme, IncrementalPatcher, PatchScheme, SpaceScheme, patch_document

CONTENTS = [text.encode() for text in TEXTS.values()]


def fresh_pair(seed: int, **overrides: Any) -> tuple[Any, BLT]:
    """transformers' model and ours with the same weights."""
    torch.manual_seed(seed)
    config = preset("blt-debug", **overrides)
    theirs = their_blt(config, attention="sdpa")  # type: ignore[arg-type]  # the preset is a BLT's
    ours = BLT(config)  # type: ignore[arg-type]
    ours.load_state_dict(blt_weights(theirs.state_dict(), ours.config))
    return theirs, ours


def entropies_of(model: ByteLM, content: bytes) -> Any:
    with torch.no_grad():
        return next_byte_entropy(model(pack_documents([np.append(frame(content), 0)])[0])).numpy().astype(np.float16)


def check_against_transformers(contents: list[bytes], seed: int) -> None:
    """Logits, loss and the gradient of every parameter, on patches that a fresh entropy model makes."""
    theirs, ours = fresh_pair(seed)
    lm = fresh_byte_lm(seed)
    entropies = [entropies_of(lm, content) for content in contents]
    scheme = EntropyScheme(threshold=float(np.median(np.concatenate(entropies))), max_patch_length=12)
    rows = [frame(content) for content in contents]
    lengths = [patch_document(scheme, *pair) for pair in zip(contents, entropies, strict=True)]
    batch, targets = pack_documents(rows, lengths)
    logits = ours(batch)
    loss = cross_entropy_sum(logits, targets)
    torch.autograd.backward(loss)
    place, expected_loss = 0, 0.0
    for row, patches in zip(rows, lengths, strict=True):
        expected = their_logits(theirs, row.astype(np.int64), patches.astype(np.int64))
        assert_close(logits[place : place + len(expected)].detach(), expected.detach())
        place += len(expected)
        part = cross_entropy(expected, torch.from_numpy(row[1:].astype(np.int64)), reduction="sum")
        expected_loss += part.item()
        torch.autograd.backward(part)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(theirs.parameters()))
    for name, gradient in blt_weights(gradients, ours.config).items():
        actual = ours.get_parameter(name).grad
        assert actual is not None
        torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()), msg=name)


def test_logits_loss_and_gradients_equal_those_of_transformers() -> None:
    check_against_transformers(CONTENTS, fresh_seed())


def test_entropies_equal_those_of_transformers() -> None:
    torch.manual_seed(fresh_seed())
    config = preset("entropy-debug")
    theirs, ours = their_patcher(config, "sdpa"), ByteLM(config)  # type: ignore[arg-type]  # the preset is a ByteLM's
    ours.load_state_dict(byte_lm_weights(theirs.state_dict(), ours.config))
    rows = [frame(content) for content in CONTENTS]
    with torch.no_grad():
        actual = torch.split(next_byte_entropy(ours(pack_documents(rows)[0])), [len(row) - 1 for row in rows])
        for row, entropies in zip(rows, actual, strict=True):
            assert_close(entropies, theirs(torch.from_numpy(row[None, :-1].astype(np.int64)))[0][0])


def continue_all(model: BLT, scheme: PatchScheme, prompts: list[bytes], rows: int) -> list[Completion]:
    generator = Generator(model, new_patcher=lambda: IncrementalPatcher(scheme), rows=rows)
    return generator.generate([Request(prompt=prompt, max_new_bytes=16) for prompt in prompts])


def test_cached_generation_equals_recomputation_and_batches_single_texts() -> None:
    """Prompts end anywhere, also inside a character."""
    seed = fresh_seed()
    model, scheme = fresh_blt(seed), SpaceScheme(max_patch_length=7)
    cuts = np.random.default_rng(seed).integers(1, [len(content) for content in CONTENTS])
    prompts = [content[:cut] for content, cut in zip(CONTENTS, cuts, strict=True)]
    single, batched = continue_all(model, scheme, prompts, 1), continue_all(model, scheme, prompts, 5)
    for prompt, one, other in zip(prompts, single, batched, strict=True):
        uncached = generate_uncached(model, prompt, next_patch=IncrementalPatcher(scheme), max_new_bytes=16)
        assert one.content == bytes(uncached)
        assert other.content == one.content
        assert other.patches == one.patches
        assert np.allclose(one.log_probabilities, other.log_probabilities, rtol=0, atol=1e-5)


def test_real_text_in_many_languages(shared_data: Path) -> None:
    """The beginnings of documents drawn from the multilingual sample."""
    files = sorted((shared_data / "multilingual").rglob("*.jsonl.zst"))
    if not files:
        pytest.skip("no multilingual sample")
    seed = fresh_seed()
    with zstandard.open(files[-1], "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    chosen = np.random.default_rng(seed).choice(len(texts), 12, replace=False)
    check_against_transformers([texts[index].encode()[:200] for index in chosen], seed)
