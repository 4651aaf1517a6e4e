"""Framed documents, end to end, cut into windows of a fixed number of tokens.

A window is what the entropy model sees at once. Nothing is padded and nothing is forgotten: a document that a window's
edge cuts goes on in the next, whose first document it is, with the model's state carried over. Only one window is in
memory at a time, so a document may be of any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blt_data.errors import InputError
from blt_data.framing import BOS_ID, BYTE_OFFSET, EOS_ID, FRAME_TOKENS
from blt_patcher.kernels import frame_span


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """T tokens of framed documents laid end to end."""

    first_token: int
    """Place of the window's first token among all framed tokens."""

    tokens: npt.NDArray[np.int64]
    """int64 [T] token ids."""

    document_offsets: npt.NDArray[np.int32]
    """int32 [D + 1] where each document's tokens begin in the window; from 0 to T, no document empty."""

    continues: bool
    """Whether the first document began in an earlier window."""


def framed_offsets(content_offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where each document's framed tokens begin: int64 [D + 1], from 0 to N + 2D.

    Args:
        content_offsets: int64 [D + 1] where each document's bytes begin.
    """
    documents = np.arange(content_offsets.size, dtype=np.int64)
    offsets: npt.NDArray[np.int64] = content_offsets - content_offsets[0] + FRAME_TOKENS * documents
    return offsets


def cut_windows(
    content: npt.NDArray[np.uint8], content_offsets: npt.NDArray[np.int64], window_tokens: int
) -> Iterator[Window]:
    """Yield the windows of some documents in order.

    Args:
        content: uint8 [N] the documents' bytes.
        content_offsets: int64 [D + 1] document d is content[content_offsets[d]:content_offsets[d + 1]].
        window_tokens: tokens in every window but the last, which holds the rest; at least 1.

    Raises:
        InputError: `window_tokens` is less than 1.
    """
    if window_tokens < 1:
        raise InputError(f"window_tokens is {window_tokens}; a window holds at least 1 token")
    offsets = framed_offsets(content_offsets)
    for low in range(0, int(offsets[-1]), window_tokens):
        high = min(low + window_tokens, int(offsets[-1]))
        first = int(np.searchsorted(offsets, low, side="right")) - 1
        end = int(np.searchsorted(offsets, high, side="left"))
        tokens = np.empty(high - low, dtype=np.int64)
        frame_span(content, content_offsets, offsets, first, low, tokens, BOS_ID, EOS_ID, BYTE_OFFSET)
        yield Window(
            first_token=low,
            tokens=tokens,
            document_offsets=(np.clip(offsets[first : end + 1], low, high) - low).astype(np.int32),
            continues=bool(offsets[first] < low),
        )
