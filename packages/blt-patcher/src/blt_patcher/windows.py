"""Framed documents, end to end, cut into windows of a fixed number of tokens.

A window is what the entropy model sees at once: a batch with a budget of tokens. Nothing is forgotten: a document that
a window's edge cuts goes on in the next, whose first document it is, with the model's state carried over. Only one
window is in memory at a time, so a document may be of any length.

What attends only to itself is called a context here: a document, or one line of it where contexts start afresh at new
lines. A context is cut at multiples of 128 of its own tokens, so that a GPU's kernels cut it into the same tiles
whatever stands around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError
from blt_data.framing import BOE_ID, BOS_ID, BYTE_OFFSET, EOS_ID, FRAME_TOKENS
from blt_patcher.spans import frame_span

#: Token of a new line (U+000A), which begins a context of its own where contexts start afresh at new lines.
NEWLINE_ID: Final = BYTE_OFFSET + ord("\n")

#: Contexts are cut at multiples of so many of their tokens, in windows that hold at least eight times as many.
CUT_ALIGNMENT: Final = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """n tokens of framed documents laid end to end, and possibly padding: T tokens in all."""

    first_token: int
    """Place of the window's first token among all framed tokens."""

    tokens: npt.NDArray[np.int64]
    """int64 [T] token ids."""

    context_offsets: npt.NDArray[np.int32]
    """int32 [C + 1] where each context's tokens begin in the window; from 0 to T, no context empty. Padding is a
    context of its own."""

    continues: bool
    """Whether the first context began in an earlier window."""

    padding: slice
    """Which tokens are padding; it stands before the last context where that goes on in the next window."""

    @property
    def count(self) -> int:
        """n, the tokens that are no padding."""
        return int(self.tokens.size - (self.padding.stop - self.padding.start))

    def without_padding(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the values of real tokens.

        Args:
            values: [T] one for every token.

        Returns:
            [n] in order.
        """
        if self.padding.stop == self.padding.start:
            return values
        return np.concatenate([values[: self.padding.start], values[self.padding.stop :]])


def framed_offsets(content_offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where each document's framed tokens begin: int64 [D + 1], from 0 to N + 2D.

    Args:
        content_offsets: int64 [D + 1] where each document's bytes begin.
    """
    documents = np.arange(content_offsets.size, dtype=np.int64)
    offsets: npt.NDArray[np.int64] = content_offsets - content_offsets[0] + FRAME_TOKENS * documents
    return offsets


def window_capacity(window_tokens: int) -> int:
    """Return the tokens of a full window: `window_tokens`, down to a multiple of 128 where it is at least 1,024.

    Raises:
        InputError: it is less than 1.
    """
    if window_tokens < 1:
        raise InputError(f"window_tokens is {window_tokens}; a window holds at least 1 token")
    return window_tokens - window_tokens % _alignment(window_tokens)


def _alignment(window_tokens: int) -> int:
    return CUT_ALIGNMENT if window_tokens >= 8 * CUT_ALIGNMENT else 1


def cut_windows(
    content: npt.NDArray[np.uint8],
    content_offsets: npt.NDArray[np.int64],
    window_tokens: int,
    *,
    reset_at_newlines: bool = False,
    pad: bool = False,
) -> Iterator[Window]:
    """Yield the windows of some documents in order.

    Args:
        content: uint8 [N] the documents' bytes.
        content_offsets: int64 [D + 1] document d is content[content_offsets[d]:content_offsets[d + 1]].
        window_tokens: tokens in a window at most; at least 1. Windows of 1,024 and more hold up to 127 fewer, because a
            context is cut at a multiple of 128 of its tokens.
        reset_at_newlines: begin a context at every document and at every newline token, instead of at documents alone.
        pad: fill every window up to `window_capacity(window_tokens)` tokens.

    Raises:
        InputError: `window_tokens` is less than 1.
    """
    capacity, alignment = window_capacity(window_tokens), _alignment(window_tokens)
    offsets = framed_offsets(content_offsets)
    total = int(offsets[-1])
    low = opened = 0
    while low < total:
        high = min(low + capacity, total)
        # One token more tells whether a context begins where the window ends.
        first = int(np.searchsorted(offsets, low, side="right")) - 1
        tokens = np.empty(min(high + 1, total) - low, dtype=np.int64)
        frame_span(content, content_offsets, offsets, first, low, tokens, BOS_ID, EOS_ID, BYTE_OFFSET)
        starts = offsets[np.searchsorted(offsets, low) : np.searchsorted(offsets, high, side="right")]
        if reset_at_newlines:
            starts = np.union1d(starts, low + np.flatnonzero(tokens == NEWLINE_ID))
        inner = starts[starts < high]
        opened = int(inner[-1]) if inner.size else opened
        if not starts.size or starts[-1] != high:
            high = opened + (high - opened) // alignment * alignment
        yield _window(low, tokens[: high - low], inner[inner < high], opened, capacity if pad else high - low)
        low = high


def _window(low: int, tokens: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], opened: int, size: int) -> Window:
    """Make a window of n tokens.

    Args:
        low: place of its first token.
        tokens: int64 [n].
        starts: places where contexts begin, from `low` to before `low + n`.
        opened: where the last context that began before the window's end, or at it, begins.
        size: T.
    """
    count = tokens.size
    missing = size - count
    # A context that goes on in the next window comes last, so that the model's state is its state. One that ends with
    # the window may stand there too: its state is dropped.
    place = opened - low if low < opened < low + count else count
    offsets = np.concatenate([[0], starts[starts > low] - low, [count]])
    if missing:
        tokens = np.concatenate([tokens[:place], np.full(missing, BOE_ID, dtype=np.int64), tokens[place:]])
        offsets = np.concatenate([offsets[offsets <= place], offsets[offsets >= place] + missing])
    return Window(
        first_token=low,
        tokens=tokens,
        context_offsets=offsets.astype(np.int32),
        continues=not (starts.size and starts[0] == low),
        padding=slice(place, place + missing),
    )
