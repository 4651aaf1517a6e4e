"""Steps that are launched before they are known to be wanted, by kernels in Triton's interpreter; see `test_kernels`.

The device is a thread of its own, and a stack in one launch is its blocks one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.blt_model.generation_oracle import (
    Odd,
    fresh_seed,
    one_layer_models,
    run_uncaptured,
    without_ties,
)
from tests.blt_model.triton_runs import CUDA, DEVICE, need_kernels, run_interpreted, runs_interpreted
from torch import Tensor, nn

from blt_model import BLT, ByteLM, Completion, Generator, Request, SamplingOptions
from blt_model.config import HashEmbeddingConfig
from blt_model.generation import fused
from blt_model.generation.go_ahead import ROOM, GoAhead, launches_wait
from blt_model.generation.resident import Parts, Tap
from blt_model.generation.single_row import SingleRowSession
from blt_model.generation.steps import HashHistory
from blt_model.hash_embedding import HashEmbedding

on_cpu = pytest.mark.skipif(CUDA, reason="compares bytes, which half precision leaves to rounding")


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def device() -> Iterator[ThreadPoolExecutor]:
    need_kernels()
    with ThreadPoolExecutor(1) as thread:
        yield thread


@runs_interpreted
def test_in_the_interpreter() -> None:
    """All other tests of this file, in a process whose Triton interprets."""
    run_interpreted(__file__)


class Blocks:
    """Stands for a stack in one launch: the same blocks by plain steps, which read a patch as that does."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __call__(
        self, x: Tensor, positions: Tensor, programs: int, tap: Tap | None = None, skipped: Tensor | None = None
    ) -> Tensor:
        if skipped is not None and int(skipped) != 0:
            return torch.full_like(x, torch.nan)
        parts = self._parts
        layers = [(cache, layer) for cache in parts.caches for layer in range(cache.config.num_layers)]
        crosses = iter(range(len(parts.crosses)))
        for index, (block, (cache, layer)) in enumerate(zip(parts.blocks, layers, strict=True)):
            if index in parts.crosses:
                x = self._read(x, index, next(crosses))
            x = block(x, cache, layer, cache.plan_static(positions, None, cache.capacity))
            if index == parts.tap and tap is not None:
                tap.out.copy_(x)
                tap.rows[tap.row] = x
        return x

    def _read(self, x: Tensor, layer: int, index: int) -> Tensor:
        cross, patch = self._parts.crosses[layer], self._parts.patch
        assert patch is not None
        scores = patch.keys[index, : patch.scores] @ cross.query_norm(x)[0]
        shares = scores.view(-1, patch.vectors).softmax(1).flatten()
        return float(cross.residual) * x + patch.values[index, :, : patch.scores] @ shares


def run_ahead(monkeypatch: pytest.MonkeyPatch, device: ThreadPoolExecutor) -> list[bool]:
    """Take the steps that a GPU takes, on a thread; returns of each launch whether it was known to be wanted."""
    known: list[bool] = []
    launch = SingleRowSession._launch

    def note(self: SingleRowSession, uniform: float, *, is_wanted: bool) -> None:
        known.append(is_wanted)
        launch(self, uniform, is_wanted=is_wanted)

    monkeypatch.setattr(SingleRowSession, "_launch", note)
    monkeypatch.setattr(fused, "available", lambda model: True)
    monkeypatch.setattr(fused, "can_be_resident", lambda parts: parts.caches[0].rows == 1)
    monkeypatch.setattr(fused, "ResidentStack", Blocks)
    monkeypatch.setattr("blt_model.generation.single_row._LOOKS", 10**9)
    run_uncaptured(monkeypatch, device)
    return known


@on_cpu
def test_texts_are_the_same(device: ThreadPoolExecutor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps that were wanted and some that were not, drawn bytes too, whose random numbers go with the step."""
    drawn = SamplingOptions(temperature=1.0, seed=seed % 1000)

    def generate(model: BLT, entropy_model: ByteLM) -> list[tuple[bytes, int]]:
        generator = Generator(model, new_patcher=Odd, entropy_model=entropy_model)
        requests = [
            Request(prompt=b"ab ", max_new_bytes=4),
            Request(prompt=b"", max_new_bytes=4, sampling=drawn),
            Request(prompt=b"text", max_new_bytes=2),
        ]
        return [(done.content, done.patches) for done in generator.generate(requests)]

    model, entropy_model, wanted = without_ties(seed, generate)
    known = run_ahead(monkeypatch, device)
    assert generate(model, entropy_model) == wanted
    # Known to be wanted are the first of a text, the first of a kind, and what follows a complete patch.
    assert known.count(False) > 0
    assert known.count(True) <= 3 + 2 + sum(patches for _, patches in wanted)


@on_cpu
def test_nothing_is_launched_ahead_where_launches_wait(
    device: ThreadPoolExecutor, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the launch would wait for the word, and the host for the launch."""
    for value in ("", "0", "1"):
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", value)
        assert launches_wait() is (value == "1")
    known = run_ahead(monkeypatch, device)
    model, entropy_model = one_layer_models(seed)
    generator = Generator(model, new_patcher=Odd, entropy_model=entropy_model)
    generator.generate([Request(prompt=b"ab ", max_new_bytes=3)])
    assert all(known)
    assert len(known) > 1


@on_cpu
@pytest.mark.parametrize("after", [1, 2])
def test_the_device_is_not_left_waiting(
    device: ThreadPoolExecutor, after: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong between the launch and the decision, or before the launch; and texts after it are right."""
    pushed = 0

    class Broken(Odd):
        def push(self, token_id: int, entropy: float) -> bool:
            nonlocal pushed
            pushed += 1
            if pushed == 4 + after:
                raise RuntimeError("cannot say")
            return super().push(token_id, entropy)

    request = Request(prompt=b"ab ", max_new_bytes=4)

    def generate(model: BLT, entropy_model: ByteLM) -> Completion:
        return Generator(model, new_patcher=Odd, entropy_model=entropy_model).generate([request])[0]

    model, entropy_model, wanted = without_ties(seed, generate)
    known = run_ahead(monkeypatch, device)
    generator = Generator(model, new_patcher=Broken, entropy_model=entropy_model)
    with pytest.raises(RuntimeError, match="cannot say"):
        generator.generate([request])
    assert not known[-1]
    assert device.submit(lambda: "free").result(timeout=100) == "free"
    session = generator._session
    assert isinstance(session, SingleRowSession)
    assert session._go_ahead is not None
    session._go_ahead.begin(0.0)
    (found,) = generator.generate([request])
    assert (found.content, found.patches) == (wanted.content, wanted.patches)


@on_cpu
def test_entropies_that_are_no_numbers(device: ThreadPoolExecutor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach the patcher as such, and are not waited for in vain."""
    model, entropy_model = one_layer_models(seed)
    with torch.no_grad():
        entropy_model.head.weight.fill_(torch.nan)
    seen: list[float] = []

    class Recording(Odd):
        def push(self, token_id: int, entropy: float) -> bool:
            seen.append(entropy)
            return token_id == 1

    known = run_ahead(monkeypatch, device)
    generator = Generator(model, new_patcher=Recording, entropy_model=entropy_model)
    (done,) = generator.generate([Request(prompt=b"ab ", max_new_bytes=4)])
    assert len(seen) == 4 + len(done.content) - 1
    assert all(map(math.isnan, seen))
    assert known.count(False) == 2


def history() -> HashHistory:
    torch.manual_seed(0)
    module = HashEmbedding(HashEmbeddingConfig(table_size=97), 32).to(DEVICE)
    nn.init.normal_(module.weight)
    return HashHistory(module, 1)


def test_a_word_is_waited_for(device: ThreadPoolExecutor) -> None:
    """A launch ends when it has its word, and then only if that says so the history moves on."""
    hashes, go_ahead = history(), GoAhead(DEVICE)
    hashes.symbols.copy_(torch.arange(10, 10 + hashes.symbols.shape[1])[None])
    expected = hashes.symbols[0].tolist()
    for turn in range(2 * ROOM + 1):
        wanted, token = turn % 3 != 1, torch.tensor([100 + turn], device=DEVICE)
        before = go_ahead.uniform.clone()
        go_ahead.begin(turn / 16)

        def run(token: Tensor = token) -> None:
            fused.await_word(go_ahead, 10 * token, token, hashes, draws=True)
            if CUDA:
                torch.cuda.synchronize()

        launch = device.submit(torch.inference_mode()(run))
        with pytest.raises(TimeoutError):
            launch.result(timeout=0.05)
        go_ahead.say(wanted=wanted)
        launch.result(timeout=100)
        assert go_ahead.state[:2].tolist() == [turn + 1, not wanted]
        assert int(go_ahead.skipped) == (not wanted)
        if wanted:
            assert int(go_ahead.place) == 10 * int(token)
            expected = [100 + turn, *expected[:-1]]
        assert hashes.symbols[0].tolist() == expected
        assert float(go_ahead.uniform) == (turn / 16 if wanted else float(before))


def test_embeddings_of_two_models(device: ThreadPoolExecutor, seed: int) -> None:
    """Read at once, and the history left as it is."""
    torch.manual_seed(seed)
    hashes = history()
    hashes.symbols.copy_(torch.randint(4, 260, hashes.symbols.shape, device=DEVICE))
    before = hashes.symbols.clone()
    tables: list[Tensor] = [torch.randn(260, dim, device=DEVICE) for dim in (32, 24)]
    tokens, positions = torch.tensor([77], device=DEVICE), torch.tensor([30], device=DEVICE)
    options: dict[str, Any] = {"average": False}
    found, other = fused.embed(tokens, positions, hashes, tables[0], lm_table=tables[1], moves=False, **options)
    assert torch.equal(hashes.symbols, before)
    wanted, nothing = fused.embed(tokens, positions, hashes, tables[0], **options)
    assert nothing is None
    assert torch.equal(found, wanted)
    assert other is not None
    assert torch.equal(other, tables[1][77:78])
    assert hashes.symbols[0].tolist() == [77, *before[0, :-1].tolist()]
