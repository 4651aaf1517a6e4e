"""Scores of given continuations equal those of the model over the whole document, however they are computed."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tests.blt_model.generation_oracle import (
    Recorder,
    Ties,
    document_logits,
    fresh_blt,
    fresh_byte_lm,
    fresh_seed,
    likeliest,
)

from blt_model import BLT, ByteLM, Generator, ModelError, Request
from blt_model.generation import scoring
from blt_patcher import EntropyScheme, IncrementalPatcher, SpaceScheme


def pairs_of(rng: random.Random) -> list[tuple[bytes, bytes]]:
    prompts = [bytes(rng.choices(b"abc d", k=rng.randrange(60))) for _ in range(3)]
    return [(rng.choice(prompts), bytes(rng.choices(b"abc d", k=rng.randrange(12)))) for _ in range(14)] + [
        (b"", b"x"),
        (b"lonely", b"y z"),
    ]


@pytest.mark.parametrize("step_tokens", [0, 128], ids=["shared", "packed"])
@pytest.mark.parametrize("with_end", [False, True])
@pytest.mark.parametrize("kind", ["blt", "byte-lm"])
def test_scores(kind: str, with_end: bool, step_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "STEP_TOKENS", step_tokens)
    seed = fresh_seed()
    rng = random.Random(seed)
    entropy_model = fresh_byte_lm(seed + 1)
    model: BLT | ByteLM = fresh_blt(seed) if kind == "blt" else fresh_byte_lm(seed)
    recorder = Recorder(EntropyScheme(threshold=5.0, max_patch_length=6))
    pairs = pairs_of(rng)
    generator = Generator(model, new_patcher=recorder, entropy_model=entropy_model, rows=3, prefill_tokens=100)
    scores = generator.score([a for a, _ in pairs], [b for _, b in pairs], with_end=with_end)
    ties = Ties()
    for (prompt, continuation), score in zip(pairs, scores, strict=True):
        content = prompt + continuation
        targets = [*(byte + 4 for byte in continuation), *([2] if with_end else [])]
        assert len(score.log_probabilities) == len(targets)
        if not targets:
            assert (score.total, score.is_greedy) == (0.0, True)
            continue
        record = recorder.of([1, *(byte + 4 for byte in content)]) if kind == "blt" else None
        logits = document_logits(model, content, record, entropy_model, ties)[len(prompt) :][: len(targets)]
        exact = torch.log_softmax(logits.double(), -1)[range(len(targets)), targets]
        torch.testing.assert_close(torch.tensor(score.log_probabilities, dtype=torch.float64), exact, rtol=0, atol=1e-5)
        assert score.total == pytest.approx(math.fsum(score.log_probabilities), abs=1e-12)
        assert score.is_greedy == ([likeliest(row) for row in logits] == targets)
    assert ties.roundings <= 2 + 0.02 * ties.tokens


def test_a_generated_text_is_scored_as_it_was_generated() -> None:
    seed = fresh_seed()
    generator = Generator(fresh_blt(seed), new_patcher=lambda: IncrementalPatcher(SpaceScheme()), rows=2)
    prompts = [b"a b", b"the quick brown"]
    done = generator.generate([Request(prompt=prompt, max_new_bytes=20) for prompt in prompts])
    scores = generator.score(prompts, [completion.content for completion in done])
    for completion, score in zip(done, scores, strict=True):
        assert score.is_greedy
        assert score.log_probabilities == pytest.approx(completion.log_probabilities, abs=1e-5)


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(ModelError, match="2 prompts and 1 continuations"):
        Generator(fresh_byte_lm(0)).score([b"", b""], [b""])
