"""Scoring documents with the entropy model: nats after every framed token, as stored in shards.

Documents stream through the model in windows of a fixed number of tokens (`windows`), the open context's last keys and
values carried from window to window, so the result is that of each document scored whole and alone, to the rounding of
the arithmetic. Memory does not grow with a document's length but for its own entropies.

In float16 (on a GPU, unless told otherwise) blt-model's `ScoringTrunk` runs, and documents beyond float16's range are
scored in bfloat16, in which the trunk runs under autocast with its weights cast once. The last norm, the head and the
softmax keep float32's precision, since rounding there would go straight into the entropies. Windows are then padded to
one size and contexts cut where kernels' tiles end, so that a document's entropies do not depend on its neighbours.
Copies to and from a GPU are pinned and asynchronous, and results are read two windows late, so that the GPU never waits
for Python.

This module needs torch and blt-model (`pip install 'blt-patcher[entropy]'`).
"""

from __future__ import annotations

import copy
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blt_data.errors import InputError
from blt_model import ByteLM, ScoringTrunk, StreamState, next_byte_entropy, to_json
from blt_model.scoring_trunk import fits_float16
from blt_model.weights import load_model, model_fingerprint
from blt_patcher.windows import Window, cut_windows, framed_offsets, window_capacity

log = logging.getLogger(__name__)

#: Tokens in a window unless told: enough to keep a GPU busy with a 100M model, few enough for a CPU's caches.
GPU_WINDOW_TOKENS: Final = 65_536
CPU_WINDOW_TOKENS: Final = 4_096

#: What the trunk may be computed in.
PRECISIONS: Final = ("float32", "bfloat16", "float16")

#: Windows whose results may still be on their way from the GPU.
_WINDOWS_IN_FLIGHT: Final = 2


def load_entropy_model(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> ByteLM:
    """Load the byte-level language model whose entropies decide on boundaries.

    Args:
        path: a model directory (config.json and model.safetensors), or a training run, whose `latest` is taken.
        device: where its weights go.

    Raises:
        InputError: the directory holds a model of another architecture.
        ModelError: it is missing or damaged.
    """
    latest = Path(path) / "latest"
    model = load_model(latest if latest.is_dir() else path, device=device)
    if not isinstance(model, ByteLM):
        raise InputError(
            f"{os.fspath(path)}: is a {to_json(model.config)['architecture']} model, and entropies need a byte-lm; "
            "name the directory of an entropy model"
        )
    return model


def choose_device(name: str | None) -> torch.device:
    """Return the device to score on.

    Args:
        name: torch's name of it, such as `cpu`, `cuda` or `cuda:1`; None takes the GPU if there is one.

    Raises:
        InputError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            # Torch makes tensors there, but nothing can be computed or read from them.
            raise RuntimeError(f"no arithmetic on {name}")
    except (RuntimeError, AssertionError) as error:
        # torch answers with an AssertionError where it was built without CUDA.
        raise InputError(f"device {name!r} cannot be used here; choose cpu, or leave --device out") from error
    return device


@dataclass(frozen=True, slots=True)
class _Arrival:
    """One window's entropies on their way to the host."""

    window: Window
    nats: Tensor
    ready: torch.cuda.Event | None


class EntropyScorer:
    """An entropy model on a device, ready to score any number of documents."""

    def __init__(
        self,
        model: ByteLM,
        *,
        device: str | torch.device = "cpu",
        window_tokens: int | None = None,
        precision: str | None = None,
        compile: bool | None = False,
        reset_at_newlines: bool = False,
    ) -> None:
        """Put a model on a device.

        Args:
            model: the entropy model; it is put in evaluation mode, and left where it is if the scorer needs a copy.
            device: `cpu`, or one GPU.
            window_tokens: tokens that the model sees at once; None takes what suits the device.
            precision: one of `PRECISIONS`, of the trunk; None takes float16 on a GPU, or bfloat16 if the weights are
                too large for it or the model is to be compiled, and the weights' own on a CPU.
            compile: compile the model with torch.compile; worth it on a GPU and for much data. None does so on a GPU,
                but not in float16, where nothing is left to compile.
            reset_at_newlines: start the model's context afresh at every newline token, which is the new context's
                first token.

        Raises:
            InputError: `window_tokens` is less than 1, or there is no such precision, or float16 is to be compiled.
            ModelError: the weights are too large for float16.
        """
        self.device = torch.device(device)
        self.settings = scoring_settings(
            model, self.device.type, window_tokens=window_tokens, precision=precision, compile=compile
        )
        """What decides on the last bits of the result besides the model, for provenance."""
        self.window_tokens: int = self.settings["window_tokens"]
        self.reset_at_newlines = reset_at_newlines
        self.model = model.eval()
        precision, self._compiled = self.settings["precision"], self.settings["compiled"]
        self._bfloat16, self._float16 = precision == "bfloat16", precision == "float16"
        # What computes may differ from what is identified: its weights lie on the device, in the precision asked for.
        self._runner: ByteLM | ScoringTrunk
        if self._float16:
            self._runner = ScoringTrunk(model, self.device)
        else:
            self._runner = _in_bfloat16(model, self.device) if self._bfloat16 else model.to(self.device)
        # Fixed shapes are compiled once; and rows of a matrix product come out the same whatever is in the others.
        self._pads = self._compiled or self._bfloat16 or self._float16
        self._forward: Callable[..., Any] = torch.compile(self._entropies) if self._compiled else self._entropies

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The model's fingerprint and configuration and how its contexts begin, for provenance."""
        return scorer_identity(self.model, self.reset_at_newlines)

    def score(
        self,
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        *,
        name: str = "the documents",
        advance: Callable[[int], None] | None = None,
    ) -> npt.NDArray[np.float16]:
        """Return the entropies of some documents, each scored whole and alone.

        Args:
            content: uint8 [N] the documents' bytes.
            content_offsets: int64 [D + 1] document d is content[content_offsets[d]:content_offsets[d + 1]].
            name: what the documents are called in an error message.
            advance: called with the number of tokens done, window by window.

        Returns:
            float16 [N + 2D] nats of the next-token distribution after each framed token, document by document.

        Raises:
            InputError: the model gives an entropy that is not finite, a window does not fit the GPU's memory, or the
                model cannot be compiled here.
        """
        offsets = framed_offsets(content_offsets)
        result = self._score_windows(content, content_offsets, offsets, None if self._float16 else name, advance)
        if self._float16 and not np.isfinite(result).all():
            self._score_anew(result, content, content_offsets, offsets, name)
        return result

    def _score_windows(
        self,
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        name: str | None,
        advance: Callable[[int], None] | None,
    ) -> npt.NDArray[np.float16]:
        """Do what `score` says, in this precision alone.

        Args:
            content: as there.
            content_offsets: as there.
            offsets: int64 [D + 1] where each document's framed tokens begin.
            name: as there; None lets entropies be that are not finite.
            advance: as there.
        """
        result = np.empty(int(offsets[-1]), dtype=np.float16)
        arrivals: deque[_Arrival] = deque()

        def collect() -> None:
            arrival = arrivals.popleft()
            if arrival.ready is not None:
                arrival.ready.synchronize()
            low, count = arrival.window.first_token, arrival.window.count
            nats = arrival.window.without_padding(arrival.nats.numpy())
            if name is not None:
                _check_finite(nats, low, offsets, name)
            result[low : low + count] = nats
            if advance is not None:
                advance(count)

        with self.arithmetic():
            beginning = state = self.begin()
            for window in cut_windows(
                content, content_offsets, self.window_tokens, reset_at_newlines=self.reset_at_newlines, pad=self._pads
            ):
                nats, state = self._run(window, state if window.continues else beginning)
                arrivals.append(self._send(window, nats))
                if len(arrivals) > _WINDOWS_IN_FLIGHT:
                    collect()
        while arrivals:
            collect()
        return result

    def _score_anew(
        self,
        result: npt.NDArray[np.float16],
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        name: str,
    ) -> None:
        """Score documents again whose entropies are not finite: alone, and what is too large for float16 in bfloat16.

        Alone, because a masked nan still spoils sums; so a document's entropies do not depend on its neighbours here
        either.

        Args:
            result: float16 [N + 2D], written.
            content: as `score` takes it.
            content_offsets: as `score` takes it.
            offsets: int64 [D + 1] where each document's framed tokens begin.
            name: what the documents are called in an error message.
        """
        spoiled = np.flatnonzero(np.logical_or.reduceat(~np.isfinite(result), offsets[:-1]))
        beyond = 0
        for document in spoiled.tolist():
            low, high = offsets[document : document + 2]
            alone = (content, content_offsets[document : document + 2], offsets[document : document + 2] - low)
            result[low:high] = self._score_windows(*alone, None, None)
            if not np.isfinite(result[low:high]).all():
                beyond += 1
                result[low:high] = self._wider._score_windows(*alone, None, None)
        _check_finite(result, 0, offsets, name)
        if beyond:
            log.warning("%s: %d of %d documents are beyond float16; scored in bfloat16", name, beyond, offsets.size - 1)

    @cached_property
    def _wider(self) -> EntropyScorer:
        """The same in bfloat16."""
        return EntropyScorer(
            self.model,
            device=self.device,
            window_tokens=self.window_tokens,
            precision="bfloat16",
            reset_at_newlines=self.reset_at_newlines,
        )

    @property
    def capacity(self) -> int:
        """Tokens of a full window."""
        return window_capacity(self.window_tokens)

    def begin(self) -> StreamState:
        """Return the state before a context's first token."""
        return self._runner.initial_state()

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Within it torch keeps no history, and takes the precision that `step` wants."""
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            yield

    def step(
        self, tokens: Tensor, offsets: Tensor, state: StreamState, max_length: int | None = None
    ) -> tuple[Tensor, StreamState]:
        """Score one window, within `arithmetic()`.

        Args:
            tokens: int64 [T] on the device.
            offsets: int32 [C + 1] where contexts begin; the first one continues.
            state: what the window before gave, or `begin()`.
            max_length: upper bound of a context's tokens; None means T.

        Returns:
            float16 [T] nats on the device, and the state for the next window.
        """
        if self._compiled:
            # One compiled form for any number of contexts.
            torch._dynamo.maybe_mark_dynamic(offsets, 0)
        nats, state = self._forward(tokens, offsets, state, max_length)
        return nats, state

    def _entropies(
        self, tokens: Tensor, offsets: Tensor, state: StreamState, max_length: int | None
    ) -> tuple[Tensor, StreamState]:
        """Do what `step` says; this is what gets compiled."""
        trunk, state = self._runner.stream_trunk(tokens, offsets, state, max_length=max_length)
        if isinstance(self._runner, ScoringTrunk):
            return self._runner.entropies(trunk).to(torch.float16), state
        return next_byte_entropy(self._runner.wide_logits(trunk)).to(torch.float16), state

    def _run(self, window: Window, state: StreamState) -> tuple[Tensor, StreamState]:
        """Send a window to the device and start its computation; see `step`."""
        tokens, offsets = self._to_device(window)
        # Kernels are started for the longest context that may come; lines are short, and there may be thousands.
        longest = _round_up(int(np.diff(window.context_offsets).max())) if self.reset_at_newlines else None
        try:
            return self.step(tokens, offsets, state, longest)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the GPU has too little memory for windows of {self.window_tokens:,} tokens; give fewer with "
                "--window-tokens, or another --device"
            ) from error
        except Exception as error:
            if not (self._compiled and type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))):
                raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the model cannot be compiled here ({reason}); give --no-compile") from error

    def _to_device(self, window: Window) -> tuple[Tensor, Tensor]:
        """Return a window's tokens and context offsets on the device."""
        places = window.context_offsets
        if self._compiled:
            # Contexts of no token: code compiled for any number of contexts is compiled for three and more.
            places = np.pad(places, (0, 2), mode="edge")
        tokens, offsets = torch.from_numpy(window.tokens), torch.from_numpy(places)
        if self.device.type == "cuda":
            # The pinned copies come from torch's cache of pinned memory, which keeps them until the transfer is over.
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
            offsets = offsets.pin_memory().to(self.device, non_blocking=True)
        return tokens, offsets

    def _send(self, window: Window, nats: Tensor) -> _Arrival:
        """Start the copy of a window's entropies to the host."""
        if self.device.type != "cuda":
            return _Arrival(window, nats, None)
        host = torch.empty(nats.shape, dtype=nats.dtype, pin_memory=True)
        host.copy_(nats, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives it no types
        ready.record(torch.cuda.current_stream(self.device))
        return _Arrival(window, host, ready)


def scorer_identity(model: ByteLM, reset_at_newlines: bool) -> dict[str, Any]:
    """Return a model's fingerprint and configuration and how its contexts begin, for provenance.

    Args:
        model: the entropy model.
        reset_at_newlines: whether contexts begin at newline tokens too.
    """
    return {
        "fingerprint": model_fingerprint(model),
        "config": to_json(model.config),
        "reset_at_newlines": reset_at_newlines,
    }


def scoring_settings(
    model: ByteLM, device: str, *, window_tokens: int | None, precision: str | None, compile: bool | None
) -> dict[str, Any]:
    """Return what decides on the last bits of entropies besides the model, for provenance.

    Args:
        model: the entropy model.
        device: kind of device, `cpu` or `cuda`.
        window_tokens: as `EntropyScorer` takes it.
        precision: as `EntropyScorer` takes it.
        compile: as `EntropyScorer` takes it.

    Raises:
        InputError: `window_tokens` is less than 1, or there is no such precision, or float16 is to be compiled.
    """
    if window_tokens is None:
        window_tokens = GPU_WINDOW_TOKENS if device == "cuda" else CPU_WINDOW_TOKENS
    window_capacity(window_tokens)
    if precision is None:
        own = str(next(model.parameters()).dtype).removeprefix("torch.")
        half = "bfloat16" if compile or not fits_float16(model) else "float16"
        precision = half if device == "cuda" else own
    elif precision not in PRECISIONS:
        raise InputError(
            f"precision {precision!r} is not known; choose {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    if compile is None:
        compile = device == "cuda" and precision != "float16"
    elif compile and precision == "float16":
        raise InputError("in float16 nothing is left to compile; leave --compile out, or take --precision bfloat16")
    return {
        "window_tokens": window_tokens,
        "precision": precision,
        "compiled": compile,
        "device": device,
        "torch": torch.__version__.split("+")[0],
    }


def score_documents(
    model: ByteLM, content: npt.NDArray[np.uint8], content_offsets: npt.NDArray[np.int64], **options: Any
) -> npt.NDArray[np.float16]:
    """Return the entropies of some documents: `EntropyScorer` for a single use.

    Args:
        model: the entropy model.
        content: uint8 [N] the documents' bytes.
        content_offsets: int64 [D + 1] where each document's bytes begin.
        options: as `EntropyScorer` takes them.

    Returns:
        float16 [N + 2D] nats after each framed token.

    Raises:
        InputError: see `EntropyScorer` and its `score`.
    """
    return EntropyScorer(model, **options).score(content, content_offsets)


def _in_bfloat16(model: ByteLM, device: torch.device) -> ByteLM:
    """Return a copy on a device whose blocks hold bfloat16 matrices, which autocast would else cast in every window."""
    runner = copy.deepcopy(model).to(device)
    for module in runner.blocks.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return runner


def _round_up(length: int) -> int:
    """Return a length's next power of two, so that few values occur."""
    return 1 << max(length - 1, 0).bit_length()


def _check_finite(nats: npt.NDArray[np.float16], first_token: int, offsets: npt.NDArray[np.int64], name: str) -> None:
    """Refuse entropies that are not finite, naming the first document that has one."""
    finite = np.isfinite(nats)
    if bool(finite.all()):
        return
    token = first_token + int(np.argmin(finite))
    document = int(np.searchsorted(offsets, token, side="right")) - 1
    raise InputError(
        f"{name}: the entropy model gives {float(nats[token - first_token])} for document {document} (counted from 0) "
        "after its "
        f"token {token - int(offsets[document])}; its weights are broken, so train it again or name another checkpoint"
    )
