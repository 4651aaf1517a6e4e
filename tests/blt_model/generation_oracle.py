"""What generation has to equal: the model over whole documents, in the layout of training."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from blt_data.framing import frame
from blt_model import BLT, BLTConfig, ByteLM, ByteLMConfig, Completion, next_byte_entropy, pack_documents, preset
from blt_model.generation.graphs import GraphRunner
from blt_model.generation.session import BLTSession
from blt_patcher import IncrementalPatcher, PatchScheme

Result = TypeVar("Result")

#: Log-probabilities in float32 agree to this.
TOLERANCE = 1e-5


def fresh_seed() -> int:
    """A seed of this run, printed so that a failure can be run again with BLT_TEST_SEED."""
    seed = int(os.environ.get("BLT_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    sys.stderr.write(f"BLT_TEST_SEED={seed}\n")
    return seed


class _Uncaptured:
    """Stands for a captured graph where there is no CUDA: runs the same function anew."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.replay = function


def run_uncaptured(monkeypatch: pytest.MonkeyPatch, device: Executor | None = None) -> None:
    """Take on the CPU the steps that CUDA graphs capture; on a device of one thread the host does not wait for them."""

    def enable(self: GraphRunner, device: torch.device, *, enabled: bool) -> None:
        self.enabled, self._graphs, self._pool = True, {}, None

    def capture(self: GraphRunner, function: Callable[[], None], changed: Sequence[Tensor]) -> _Uncaptured:
        @torch.inference_mode()
        def try_once() -> None:
            before = [tensor.clone() for tensor in changed]
            function()
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)

        if device is None:
            try_once()
            return _Uncaptured(function)
        # The host waits for a trial, as `GraphRunner` does.
        device.submit(try_once).result()
        return _Uncaptured(lambda: device.submit(torch.inference_mode()(function)))

    monkeypatch.setattr(GraphRunner, "__init__", enable)
    monkeypatch.setattr(GraphRunner, "_capture", capture)
    admit = BLTSession.admit

    def admit_after_all(self: BLTSession, first_row: int, texts: Sequence[Sequence[int]]) -> Tensor:
        # What a GPU does for prompts comes after what was started before.
        if device is not None:
            device.submit(int).result()
        return admit(self, first_row, texts)

    monkeypatch.setattr(BLTSession, "admit", admit_after_all)


def fresh_blt(seed: int, **overrides: Any) -> BLT:
    """A small BLT whose logits are far enough apart for greedy choices to be stable."""
    torch.manual_seed(seed)
    config = preset("blt-debug", **overrides)
    assert isinstance(config, BLTConfig)
    model = BLT(config).eval()
    with torch.no_grad():
        model.decoder.head.weight.mul_(2)
    return model


def fresh_byte_lm(seed: int, **overrides: Any) -> ByteLM:
    """A small ByteLM whose entropies differ."""
    torch.manual_seed(seed)
    config = preset("entropy-debug", **overrides)
    assert isinstance(config, ByteLMConfig)
    model = ByteLM(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(2)
    return model


def likeliest(logits: Tensor) -> int:
    """The likeliest byte or EOS of logits [V]."""
    allowed = logits.clone()
    allowed[[0, 1, 3]] = -torch.inf
    return int(allowed.argmax())


class Odd:
    """Patches that end where the fiftieths of entropies are odd, so that every entropy matters."""

    margins: ClassVar[list[float]] = []
    """How far, in fiftieths of a nat, entropies were from deciding otherwise."""

    def reset(self) -> None:
        """Nothing is kept."""

    def push(self, token_id: int, entropy: float) -> bool:
        """Every token's entropy decides anew."""
        self.margins.append(abs(entropy * 50 % 1 - 0.5))
        return token_id == 1 or round(entropy * 50) % 2 == 1


def one_layer_models(seed: int) -> tuple[BLT, ByteLM]:
    """Models as small as can be."""
    one = {"num_layers": 1}
    return fresh_blt(seed, latent=one, decoder=one), fresh_byte_lm(seed + 1, transformer=one)


def without_ties(seed: int, run: Callable[[BLT, ByteLM], Result]) -> tuple[BLT, ByteLM, Result]:
    """Small models, with what a run of them gives in which rounding could move no patch of `Odd`."""
    while True:
        model, entropy_model = one_layer_models(seed)
        with torch.no_grad():
            # The end of a text is hardly ever the likeliest.
            model.decoder.head.weight[2] = 0
        Odd.margins.clear()
        result = run(model, entropy_model)
        if min(Odd.margins) > 1e-3:
            return model, entropy_model, result
        seed += 2


class RecordingPatcher:
    """The real patcher, with a record of what it was told and what it answered."""

    def __init__(self, scheme: PatchScheme, log: list[RecordingPatcher]) -> None:
        self._patcher = IncrementalPatcher(scheme)
        self.needs_entropies = scheme.needs_entropies
        self.tokens: list[int] = []
        self.entropies: list[float] = []
        self.answers: list[bool] = []
        self._log = log

    def push(self, token_id: int, entropy: float) -> bool:
        self.tokens.append(token_id)
        self.entropies.append(entropy)
        self.answers.append(self._patcher.push(token_id, entropy))
        return self.answers[-1]

    def reset(self) -> None:
        if self.tokens:
            kept = RecordingPatcher(self._patcher.scheme, self._log)
            kept.tokens, kept.entropies, kept.answers = self.tokens, self.entropies, self.answers
            self._log.append(kept)
        self.tokens, self.entropies, self.answers = [], [], []
        self._patcher.reset()


@dataclass
class Ties:
    """Entropies that rounded to another float16 value than those of the whole document: counted, and no more."""

    tokens: int = 0
    roundings: int = 0
    decisions: int = 0

    def report(self) -> str:
        return (
            f"{self.roundings} of {self.tokens} entropies rounded to another float16 value, "
            f"{self.decisions} of them moved a patch"
        )


@dataclass
class Recorder:
    """Makes recording patchers and finds the record of a text."""

    scheme: PatchScheme
    made: list[RecordingPatcher] = field(default_factory=list)
    log: list[RecordingPatcher] = field(default_factory=list)

    def __call__(self) -> RecordingPatcher:
        patcher = RecordingPatcher(self.scheme, self.log)
        self.made.append(patcher)
        return patcher

    def of(self, tokens: Sequence[int]) -> RecordingPatcher:
        """The longest record of a text that begins so."""
        found = [record for record in (*self.made, *self.log) if record.tokens == list(tokens[: len(record.tokens)])]
        return max(found, key=lambda record: len(record.tokens))


@torch.no_grad()
def document_entropies(model: ByteLM, framed: npt.NDArray[np.uint16], context_start: int | None) -> list[float]:
    """Entropies after every token, contexts that begin inside the document being run as documents of their own."""
    cuts = [] if context_start is None else np.flatnonzero(framed == context_start).tolist()
    pieces = np.split(framed, cuts)
    values: list[float] = []
    for piece in pieces:
        values += next_byte_entropy(model(pack_documents([np.append(piece, 0)])[0])).tolist()
    return values


@torch.no_grad()
def document_logits(
    model: BLT | ByteLM,
    content: bytes,
    record: RecordingPatcher | None,
    entropy_model: ByteLM | None,
    ties: Ties,
    context_start: int | None = None,
) -> Tensor:
    """Logits [bytes + 1, V] of a whole document.

    The patches are those that the patcher makes of the whole document's own entropies. Where an entropy of the record
    rounds to another float16 value, which is counted, the recorded one is taken: the arithmetic is compared all the
    same.
    """
    framed = frame(content)
    if isinstance(model, ByteLM):
        plain_logits: Tensor = model(pack_documents([framed])[0])
        return plain_logits
    assert record is not None
    entropies = [math.nan] * len(framed)
    if entropy_model is not None:
        exact = document_entropies(entropy_model, framed, context_start)
        entropies = list(exact)
        for place, (ours, theirs) in enumerate(zip(record.entropies, exact, strict=False)):
            assert abs(ours - theirs) < TOLERANCE
            ties.tokens += 1
            if np.float16(ours) != np.float16(theirs):
                ties.roundings += 1
                entropies[place] = ours
    patcher = IncrementalPatcher(record._patcher.scheme)
    starts = [True, *(patcher.push(int(token), value) for token, value in zip(framed, entropies, strict=True))]
    assert starts[1 : len(record.answers) + 1] == record.answers
    if entropy_model is not None:
        plain = IncrementalPatcher(record._patcher.scheme)
        theirs_starts = [plain.push(int(token), value) for token, value in zip(framed, exact, strict=True)]
        ties.decisions += sum(a != b for a, b in zip(starts[1:], theirs_starts, strict=True))
    places = np.flatnonzero([*starts[: len(framed)], True])
    logits: Tensor = model(pack_documents([framed], [np.diff(places)])[0])
    return logits


def check_completion(
    model: BLT | ByteLM,
    prompt: bytes,
    completion: Completion,
    record: RecordingPatcher | None,
    entropy_model: ByteLM | None,
    ties: Ties,
    *,
    greedy: bool = True,
    tolerance: float = TOLERANCE,
    context_start: int | None = None,
) -> None:
    """Hold one completion to the whole document: bytes, log-probabilities and counts."""
    content = prompt + completion.content
    logits = document_logits(model, content, record, entropy_model, ties, context_start)[len(prompt) :]
    exact = torch.log_softmax(logits.double(), -1)
    targets = [byte + 4 for byte in completion.content]
    ours = list(completion.log_probabilities)
    assert len(ours) == len(targets)
    if completion.finish == "end":
        assert completion.end_log_probability is not None
        targets, ours = [*targets, 2], [*ours, completion.end_log_probability]
    expected = exact[torch.arange(len(targets)), torch.tensor(targets, dtype=torch.int64)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), expected, rtol=0, atol=tolerance)
    if greedy:
        assert [likeliest(row) for row in logits[: len(targets)]] == targets
    if record is not None:
        # Complete patches: every answer that another patch starts ends one. The last byte is never run.
        inputs = len(prompt) + len(targets)
        answers = record.answers[:inputs]
        assert completion.prompt_patches == sum(answers[: len(prompt) + 1])
        assert completion.patches == sum(answers[len(prompt) + 1 :])
