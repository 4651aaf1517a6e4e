"""Generation with caches: any number of texts, some of them at once, each as if it were alone.

Rows of a batch begin, patch and end independently. A text that has ended makes room for the next at once; the rows in
use stay the first ones, so that every step runs over them alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.errors import ModelError
from blt_model.generation.patching import NewPatcher
from blt_model.generation.requests import Completion, Finish, Request
from blt_model.generation.sampling import Sampler
from blt_model.generation.scoring import Item, PackedScorer, Score, score_shared, sharing_pays, targets_of
from blt_model.generation.session import BLTSession, ByteLMSession, Session
from blt_model.generation.single_row import Choose, SingleRowSession
from blt_model.generation.text import StopStrings
from blt_model.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, VOCABULARY_SIZE

Event: TypeAlias = tuple[int, bytes | Completion]
"""The number of a request, and either bytes that its text has grown by, or its completion."""


def framed_prompt(prompt: bytes) -> list[int]:
    """BOS and the ids of a document's bytes so far."""
    return [BOS_ID, *(byte + BYTE_OFFSET for byte in prompt)]


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a text ends."""

    finish: Finish
    stop: bytes | None = None
    log_probability: float | None = None


@dataclass(slots=True)
class _Text:
    """A text under way."""

    index: int
    request: Request
    stops: StopStrings
    prompt_patches: int
    started: float
    content: bytearray = field(default_factory=bytearray)
    log_probabilities: list[float] = field(default_factory=list)
    shown: int = 0

    def take(self, token: int, log_probability: float) -> _Ending | None:
        """Take the token that was chosen; returns how the text ends, if it does."""
        if token == EOS_ID:
            return _Ending(Finish.END, log_probability=log_probability)
        self.content.append(token - BYTE_OFFSET)
        self.log_probabilities.append(log_probability)
        stop = self.stops.match(self.content)
        if stop is not None:
            del self.content[-len(stop) :]
            del self.log_probabilities[-len(stop) :]
            return _Ending(Finish.STOP, stop=stop)
        return _Ending(Finish.LENGTH) if len(self.content) == self.request.max_new_bytes else None

    def completion(self, ending: _Ending, patches: int) -> Completion:
        """What the text has become; patches counts all of the row."""
        return Completion(
            content=bytes(self.content),
            finish=ending.finish,
            stop=ending.stop,
            log_probabilities=tuple(self.log_probabilities),
            end_log_probability=ending.log_probability,
            prompt_patches=self.prompt_patches,
            patches=patches - self.prompt_patches,
            seconds=time.perf_counter() - self.started,
        )

    def news(self, *, ended: bool) -> bytes:
        """Bytes that may be shown and have not been."""
        end = len(self.content) if ended else self.stops.released(self.content)
        piece = bytes(self.content[self.shown : end])
        self.shown = max(self.shown, end)
        return piece


class Generator:
    """Continues texts with a model."""

    def __init__(
        self,
        model: BLT | ByteLM,
        *,
        new_patcher: NewPatcher | None = None,
        entropy_model: ByteLM | None = None,
        context_start: int | None = None,
        rows: int = 1,
        prefill_tokens: int = 65_536,
        graphs: bool = True,
    ) -> None:
        """Make room for texts.

        Args:
            model: what predicts; its weights are used as they lie, in their dtype.
            new_patcher: makes the patcher of one text; needed for a BLT, not read for a ByteLM.
            entropy_model: gives patchers their entropies; None for schemes that need none.
            context_start: the token that begins a context of the entropy model's own, for models whose training data
                was scored so (the id of the newline byte); None for none.
            rows: texts at once.
            prefill_tokens: prompts that begin together hold at most so many tokens, unless one alone holds more.
            graphs: replay CUDA graphs where the model is on CUDA.

        Raises:
            ModelError: a BLT without new_patcher, or rows below 1.
        """
        if rows < 1:
            raise ModelError(f"rows is {rows}; give at least 1.")
        self._session: Session
        if isinstance(model, ByteLM):
            self._session = ByteLMSession(model, rows, graphs=graphs)
        elif new_patcher is None:
            raise ModelError("a blt generates patch by patch; give new_patcher, the patch scheme of its training.")
        else:
            kind = SingleRowSession if rows == 1 else BLTSession
            self._session = kind(
                model,
                rows,
                new_patcher=new_patcher,
                entropy_model=entropy_model,
                context_start=context_start,
                graphs=graphs,
            )
        self._scorer = PackedScorer(model, new_patcher, entropy_model, context_start, prefill_tokens)
        self._prefill_tokens = prefill_tokens
        device = self._session.device
        self._sampler = Sampler(rows, device)
        self._logits = torch.zeros(rows, VOCABULARY_SIZE, device=device, dtype=next(model.parameters()).dtype)
        self._texts: list[_Text] = []
        self._ahead: tuple[int, float] | None = None

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Continue texts.

        Args:
            requests: what to continue.

        Returns:
            Their completions, in the order of the requests.
        """
        done = {index: event for index, event in self.events(requests) if isinstance(event, Completion)}
        return [done[index] for index in range(len(done))]

    def stream(self, request: Request) -> Iterator[bytes]:
        """Continue one text.

        Args:
            request: what to continue.

        Yields:
            Non-empty pieces, as soon as no stop string can take them back.
        """
        for _, event in self.events([request]):
            if isinstance(event, bytes):
                yield event

    @torch.inference_mode()
    def events(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Continue texts, telling what happens as it happens.

        Args:
            requests: what to continue; they are taken from here as room becomes free.

        Yields:
            Events. The bytes of a text's events make up the content of its completion, which is its last event.
        """
        waiting = _Waiting(requests)
        self._texts, self._ahead = [], None
        while True:
            yield from self._admit(waiting)
            if not self._texts:
                return
            plan = self._sampler.plan_single() if self._session.rows == 1 else None
            if isinstance(self._session, SingleRowSession) and self._session.runs_ahead and plan is not None:
                yield from self._step_ahead(self._session, *plan)
            else:
                yield from self._step()

    @torch.inference_mode()
    def score(self, prompts: Sequence[bytes], continuations: Sequence[bytes], *, with_end: bool = False) -> list[Score]:
        """How probable given continuations are. Long prompts that several of them share are run once.

        Args:
            prompts: of the continuations, one for each; equal ones are shared.
            continuations: to score; an empty one has log-probability 0.
            with_end: score also that the document ends there.

        Returns:
            The scores, in the order of the continuations.

        Raises:
            ModelError: the numbers of prompts and continuations differ.
        """
        if len(prompts) != len(continuations):
            raise ModelError(f"there are {len(prompts)} prompts and {len(continuations)} continuations; give pairs.")
        scores = {index: Score(log_probabilities=(), is_greedy=True) for index in range(len(prompts))}
        groups: dict[bytes, list[Item]] = {}
        for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            if targets := targets_of(continuation, with_end):
                groups.setdefault(prompt, []).append(Item(index, framed_prompt(prompt), targets))
        alone: list[Item] = []
        for items in groups.values():
            if self._session.rows > 1 and sharing_pays(items):
                scores.update(score_shared(self._session, items))
            else:
                alone.extend(items)
        scores.update(self._scorer.score(alone))
        return [scores[index] for index in range(len(prompts))]

    def _admit(self, waiting: _Waiting) -> Iterator[Event]:
        """Begin as many of the waiting texts as there is room for."""
        while free := self._session.rows - len(self._texts):
            batch = waiting.take(free, self._prefill_tokens)
            if not batch:
                return
            started = time.perf_counter()
            begun = [(index, request) for index, request in batch if request.max_new_bytes > 0]
            prompts = [framed_prompt(request.prompt) for _, request in begun]
            first = len(self._texts)
            if begun:
                self._logits[first : first + len(begun)] = self._session.admit(first, prompts)
            for row, ((index, request), prompt) in enumerate(zip(begun, prompts, strict=True), start=first):
                self._sampler.begin(row, request.sampling, prompt)
                stops = StopStrings(request.stop)
                self._texts.append(_Text(index, request, stops, self._session.patches(row), started))
            for index, request in batch:
                if request.max_new_bytes == 0:
                    empty = _Text(index, request, StopStrings(()), 0, started)
                    yield index, empty.completion(_Ending(Finish.LENGTH), 0)

    def _step(self) -> Iterator[Event]:
        """Give every text one more token."""
        count = len(self._texts)
        chosen, log_probabilities = self._sampler.choose(self._logits[:count])
        goes_on = any(len(text.content) + 1 < text.request.max_new_bytes for text in self._texts)
        entropies = self._session.encode(chosen) if goes_on else None
        tokens, logs, values = _read(chosen, log_probabilities, entropies)
        endings = [text.take(token, log) for text, token, log in zip(self._texts, tokens, logs, strict=True)]
        completed = [self._session.patches(row) if endings[row] else 0 for row in range(count)]
        live = [ending is None for ending in endings]
        if any(live):
            self._logits[:count] = self._session.decode(tokens, values, live)
        for text, ending, patches in zip(self._texts, endings, completed, strict=True):
            if piece := text.news(ended=ending is not None):
                yield text.index, piece
            if ending is not None:
                yield text.index, text.completion(ending, patches)
        for row in reversed([row for row, lives in enumerate(live) if not lives]):
            self._remove(row)

    def _step_ahead(self, session: SingleRowSession, kind: Hashable, choose: Choose) -> Iterator[Event]:
        """Give the one text one more token; what follows it is under way while the caller has its turn."""
        (text,) = self._texts
        if self._ahead is None:
            tokens, logs, _ = _read(*self._sampler.choose(self._logits[:1]), None)
            self._ahead = tokens[0], logs[0]
            session.start(tokens[0], choose, kind)
            if tokens[0] != EOS_ID and text.request.max_new_bytes > 1:
                session.launch(self._sampler.draw_single())
        token, log_probability = self._ahead
        ending = text.take(token, log_probability)
        if piece := text.news(ended=ending is not None):
            yield text.index, piece
        if ending is None:
            follows = len(text.content) + 1 < text.request.max_new_bytes
            self._ahead = session.finish(token, self._sampler.draw_single() if follows else None)
            return
        yield text.index, text.completion(ending, session.patches(0))
        self._ahead = None
        self._remove(0)

    def _remove(self, row: int) -> None:
        """Take a text out; the last one takes its row."""
        last = len(self._texts) - 1
        if row < last:
            self._session.move_row(last, row)
            self._sampler.move_row(last, row)
            self._logits[row] = self._logits[last]
            self._texts[row] = self._texts[last]
        self._texts.pop()


class _Waiting:
    """Requests that have not begun, with their numbers."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._items = enumerate(requests)
        self._next: tuple[int, Request] | None = None

    def take(self, count: int, tokens: int) -> list[tuple[int, Request]]:
        """The next ones, at most so many, with prompts of at most so many tokens together; at least one."""
        taken: list[tuple[int, Request]] = []
        for item in itertools.chain([] if self._next is None else [self._next], self._items):
            self._next = None
            tokens -= len(item[1].prompt) + 1
            if taken and tokens < 0:
                self._next = item
                break
            taken.append(item)
            if len(taken) == count:
                break
        return taken


def _read(
    tokens: Tensor, log_probabilities: Tensor, entropies: Tensor | None
) -> tuple[list[int], list[float], Sequence[float] | None]:
    """Bring a step's numbers to the host, in one wait for the device."""
    parts = [tokens.double(), log_probabilities]
    if entropies is not None:
        parts.append(entropies.double())
    rows: list[list[float]] = torch.stack(parts).tolist()
    return [int(token) for token in rows[0]], rows[1], rows[2] if entropies is not None else None
