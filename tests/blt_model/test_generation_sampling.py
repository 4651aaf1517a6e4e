"""Which token is chosen: options against their definitions, draws against their distribution."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.blt_model.generation_oracle import fresh_seed

from blt_model import ModelError, SamplingOptions
from blt_model.generation.sampling import Sampler, draw_tokens

V = 260
Floats = npt.NDArray[np.float64]


def defined_probabilities(logits: Floats, options: SamplingOptions, seen: set[int]) -> Floats:
    """The distribution by definition, one option after the other."""
    scores = logits.astype(np.float64).copy()
    for token in seen if options.repetition_penalty != 1 else ():
        penalty = options.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores[[0, 1, 3]] = -np.inf
    scores = scores / options.temperature
    p = np.exp(scores - scores.max())
    p /= p.sum()
    if options.top_k is not None:
        p[np.argsort(-p, kind="stable")[options.top_k :]] = 0
        p /= p.sum()
    if options.top_p is not None:
        order = np.argsort(-p, kind="stable")
        count = int(np.searchsorted(np.cumsum(p[order]), options.top_p * (1 - 1e-12))) + 1
        p[order[count:]] = 0
        p /= p.sum()
    if options.min_p is not None:
        p[p < options.min_p * p.max()] = 0
        p /= p.sum()
    result: Floats = p
    return result


def random_options(rng: np.random.Generator) -> SamplingOptions:
    return SamplingOptions(
        temperature=float(rng.choice([0.3, 1.0, 2.0])),
        top_k=None if rng.random() < 0.3 else int(rng.integers(1, 300)),
        top_p=None if rng.random() < 0.3 else float(rng.uniform(0.05, 1)),
        min_p=None if rng.random() < 0.3 else float(rng.uniform(0, 0.3)),
        repetition_penalty=float(rng.choice([1.0, 0.7, 1.4])),
        seed=int(rng.integers(1000)),
    )


def test_draws_cover_exactly_the_defined_distribution() -> None:
    """Evenly spaced draws give every token as often as the definition says, to one draw."""
    rng = np.random.default_rng(fresh_seed())
    draws = 4000
    for _ in range(12):
        options, logits = random_options(rng), rng.normal(0, 2, V)
        scores = logits.copy()
        scores[[0, 1, 3]] = -np.inf
        expected = defined_probabilities(logits, dataclasses.replace(options, repetition_penalty=1.0), set())
        values = [options.temperature, options.top_k or V, options.top_p or 1.0, options.min_p or 0.0]
        table = torch.tensor([values], dtype=torch.float64).expand(draws, 4)
        uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
        tokens = draw_tokens(torch.from_numpy(scores).expand(draws, V), table, uniforms)
        counts = np.bincount(tokens.numpy(), minlength=V)
        assert (np.abs(counts - expected * draws) <= 1 + 1e-6).all(), options


def test_rows_of_different_options_are_chosen_independently() -> None:
    """Each row of a mixed batch draws what it draws alone, and from its own defined distribution."""
    rng = np.random.default_rng(fresh_seed())
    options = [random_options(rng) for _ in range(6)] + [SamplingOptions(), SamplingOptions(repetition_penalty=2.0)]
    prompts = [[1, *rng.integers(4, 260, 30).tolist()] for _ in options]
    steps = [rng.normal(0, 2, (len(options), V)) for _ in range(20)]
    together = Sampler(len(options), torch.device("cpu"))
    alone = [Sampler(1, torch.device("cpu")) for _ in options]
    for row, (option, prompt) in enumerate(zip(options, prompts, strict=True)):
        together.begin(row, option, prompt)
        alone[row].begin(0, option, prompt)
    seen = [set(prompt) for prompt in prompts]
    for logits in steps:
        tokens, log_probabilities = together.choose(torch.from_numpy(logits).float())
        expected = torch.log_softmax(torch.from_numpy(logits).float().double(), -1)
        for row, token in enumerate(tokens.tolist()):
            assert alone[row].choose(torch.from_numpy(logits[row : row + 1]).float())[0].tolist() == [token]
            assert log_probabilities[row] == pytest.approx(float(expected[row, token]), abs=1e-12)
            option = options[row]
            greedy = option.temperature == 0
            defined = dataclasses.replace(option, temperature=1.0) if greedy else option
            probabilities = defined_probabilities(logits[row].astype(np.float32), defined, seen[row])
            assert token == probabilities.argmax() if greedy else probabilities[token] > 0
            seen[row].add(token)


def test_moved_rows_keep_their_options_and_draws() -> None:
    seed = fresh_seed()
    logits = torch.randn(30, 1, V, generator=torch.Generator().manual_seed(seed))
    option = SamplingOptions(temperature=1.0, repetition_penalty=1.5, seed=seed % 99)
    still, moved = Sampler(3, torch.device("cpu")), Sampler(3, torch.device("cpu"))
    still.begin(0, option, [1, 50])
    moved.begin(2, option, [1, 50])
    moved.begin(0, SamplingOptions(temperature=1.0, seed=1), [1])
    for step in range(10):
        row = logits[step].expand(3, V)
        assert int(moved.choose(row)[0][2]) == int(still.choose(row[:1])[0][0])
    moved.move_row(2, 0)
    moved.begin(2, SamplingOptions(seed=4), [1])
    for step in range(10, 30):
        assert moved.choose(logits[step])[0].tolist() == still.choose(logits[step])[0].tolist()


def test_extreme_temperatures_and_logits() -> None:
    logits = torch.zeros(1, V)
    logits[0, 77] = 1e4
    for temperature in (1e-9, 1.0, 1e9):
        sampler = Sampler(1, torch.device("cpu"))
        sampler.begin(0, SamplingOptions(temperature=temperature, seed=1), [1])
        tokens = {int(sampler.choose(logits)[0]) for _ in range(50)}
        assert tokens == {77} if temperature < 1e9 else len(tokens) > 20
        assert not tokens & {0, 1, 3}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        SamplingOptions(**options)  # type: ignore[arg-type]  # bad on purpose
