"""Scoring documents with the entropy model: nats after every framed token, as stored in shards.

Documents stream through the model in windows of a fixed number of tokens (`windows`), the open document's last keys
and values carried from window to window, so the result is that of each document scored whole and alone, to the
rounding of the arithmetic. Memory does not grow with a document's length but for its own entropies.

On a GPU the arithmetic is bfloat16 under autocast; copies to and from it are pinned and asynchronous, and results are
read two windows late, so that the GPU never waits for Python.

This module needs torch and blt-model (`pip install 'blt-patcher[entropy]'`).
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt_data.errors import InputError
from blt_data.framing import BOE_ID
from blt_model import ByteLM, StreamState, next_byte_entropy, to_json
from blt_model.weights import load_model, model_fingerprint
from blt_patcher.windows import Window, cut_windows, framed_offsets

log = logging.getLogger(__name__)

#: Tokens in a window unless told: enough to keep a GPU busy with a 100M model, few enough for a CPU's caches.
GPU_WINDOW_TOKENS: Final = 16_384
CPU_WINDOW_TOKENS: Final = 4_096

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
        compile: bool = False,
    ) -> None:
        """Move a model to a device.

        Args:
            model: the entropy model; it is put in evaluation mode.
            device: `cpu`, or one GPU.
            window_tokens: tokens that the model sees at once; None takes what suits the device.
            compile: compile the model with torch.compile; worth it on a GPU and for much data.

        Raises:
            InputError: `window_tokens` is less than 1.
        """
        self.device = torch.device(device)
        if window_tokens is None:
            window_tokens = GPU_WINDOW_TOKENS if self.device.type == "cuda" else CPU_WINDOW_TOKENS
        if window_tokens < 1:
            raise InputError(f"window_tokens is {window_tokens}; a window holds at least 1 token")
        self.model = model.to(self.device).eval()
        self.window_tokens = window_tokens
        self._compiled = compile
        self._step: Callable[..., Any] = torch.compile(model.stream) if compile else model.stream

    @property
    def identity(self) -> dict[str, Any]:
        """The model's fingerprint and configuration, for provenance."""
        return {"fingerprint": model_fingerprint(self.model), "config": to_json(self.model.config)}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides on the last bits of the result besides the model, for provenance."""
        parameter = next(self.model.parameters())
        precision = "bfloat16" if self._autocasts else str(parameter.dtype).removeprefix("torch.")
        return {
            "window_tokens": self.window_tokens,
            "precision": precision,
            "compiled": self._compiled,
            "torch": torch.__version__.split("+")[0],
        }

    @property
    def _autocasts(self) -> bool:
        return self.device.type == "cuda"

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
            InputError: the model gives an entropy that is not finite, or a window does not fit the GPU's memory.
        """
        offsets = framed_offsets(content_offsets)
        result = np.empty(int(offsets[-1]), dtype=np.float16)
        arrivals: deque[_Arrival] = deque()

        def collect() -> None:
            arrival = arrivals.popleft()
            if arrival.ready is not None:
                arrival.ready.synchronize()
            low, count = arrival.window.first_token, arrival.window.tokens.size
            nats = arrival.nats[:count].numpy()
            _check_finite(nats, low, offsets, name)
            result[low : low + count] = nats
            if advance is not None:
                advance(count)

        with torch.inference_mode(), self._precision():
            state = self.model.initial_state()
            for window in cut_windows(content, content_offsets, self.window_tokens):
                if not window.continues:
                    state = self.model.initial_state()
                nats, state = self._run(window, state)
                arrivals.append(self._send(window, nats))
                if len(arrivals) > _WINDOWS_IN_FLIGHT:
                    collect()
        while arrivals:
            collect()
        return result

    def _run(self, window: Window, state: StreamState) -> tuple[Tensor, StreamState]:
        """Return a window's entropies, float32 on the device, and the state for the next window."""
        try:
            tokens, document_offsets = self._to_device(window)
            logits, state = self._step(tokens, document_offsets, state)
            return next_byte_entropy(logits), state
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the GPU has too little memory for windows of {self.window_tokens:,} tokens; give fewer with "
                "--window-tokens, or another --device"
            ) from error

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self._autocasts else nullcontext()

    def _to_device(self, window: Window) -> tuple[Tensor, Tensor]:
        """Return a window's tokens and document offsets on the device."""
        tokens, offsets = window.tokens, window.document_offsets
        if self._compiled:
            tokens, offsets = _pad(tokens, offsets, self.window_tokens)
        pair = torch.from_numpy(tokens), torch.from_numpy(offsets)
        if self.device.type != "cuda":
            return pair[0].to(self.device), pair[1].to(self.device)
        # The pinned copies come from torch's cache of pinned memory, which keeps them until the transfer is over.
        sent = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in pair]
        return sent[0], sent[1]

    def _send(self, window: Window, nats: Tensor) -> _Arrival:
        """Start the copy of a window's entropies to the host."""
        rounded = nats.to(torch.float16)
        if self.device.type != "cuda":
            return _Arrival(window, rounded.cpu(), None)
        host = torch.empty(rounded.shape, dtype=torch.float16, pin_memory=True)
        host.copy_(rounded, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch gives it no types
        ready.record(torch.cuda.current_stream(self.device))
        return _Arrival(window, host, ready)


def score_documents(
    model: ByteLM,
    content: npt.NDArray[np.uint8],
    content_offsets: npt.NDArray[np.int64],
    *,
    device: str | torch.device = "cpu",
    window_tokens: int | None = None,
    compile: bool = False,
) -> npt.NDArray[np.float16]:
    """Return the entropies of some documents: `EntropyScorer` for a single use, same arguments and errors.

    Returns:
        float16 [N + 2D] nats after each framed token.
    """
    scorer = EntropyScorer(model, device=device, window_tokens=window_tokens, compile=compile)
    return scorer.score(content, content_offsets)


def _pad(
    tokens: npt.NDArray[np.int64], offsets: npt.NDArray[np.int32], capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Fill a window up to shapes that recur, so that compiled code is made a few times and not for every window.

    Padding tokens form a last document of their own; the number of offsets goes up to a power of two with documents
    of no token.
    """
    documents = offsets.size - 1 + (tokens.size < capacity)
    room = max(16, 1 << (documents - 1).bit_length())
    padded_offsets = np.full(room + 1, capacity, dtype=np.int32)
    padded_offsets[: offsets.size] = offsets
    padded_tokens = np.full(capacity, BOE_ID, dtype=np.int64)
    padded_tokens[: tokens.size] = tokens
    return padded_tokens, padded_offsets


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
