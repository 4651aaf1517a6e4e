"""Windows: every framed token once, in order, in windows of the size asked for, contexts cut where tiles end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_data.errors import InputError
from blt_data.framing import BOE_ID, BOS_ID, BYTE_OFFSET, frame
from blt_patcher.windows import cut_windows, framed_offsets, window_capacity

NEWLINE = BYTE_OFFSET + 10
texts = st.one_of(st.binary(max_size=20), st.text("ab\n", max_size=20).map(str.encode))


@given(
    documents=st.lists(texts, max_size=8),
    window_tokens=st.integers(1, 30),
    lead=st.binary(max_size=3),
    lines=st.booleans(),
    pad=st.booleans(),
)
def test_windows_laid_end_to_end_are_the_framed_documents(
    documents: list[bytes], window_tokens: int, lead: bytes, lines: bool, pad: bool
) -> None:
    content = np.frombuffer(lead + b"".join(documents), np.uint8)
    content_offsets = np.cumsum([len(lead), *map(len, documents)], dtype=np.int64)
    framed = [frame(document) for document in documents]
    everything = np.concatenate([np.empty(0, np.uint16), *framed])
    document_starts = np.cumsum([0, *(tokens.size for tokens in framed)])
    np.testing.assert_array_equal(framed_offsets(content_offsets), document_starts)
    starts = [
        place
        for place, token in enumerate(everything.tolist())
        if token == BOS_ID or (lines and token == NEWLINE)
    ]  # fmt: skip
    windows = list(cut_windows(content, content_offsets, window_tokens, reset_at_newlines=lines, pad=pad))
    assert [window.count for window in windows[:-1]] == [window_tokens] * (len(windows) - 1)
    done = 0
    for window in windows:
        assert window.first_token == done
        assert window.tokens.size == (window_tokens if pad else window.count)
        np.testing.assert_array_equal(
            window.without_padding(window.tokens), everything[done : done + window.count]
        )  # fmt: skip
        inside = [start - done for start in starts if done < start < done + window.count]
        if not pad:
            assert window.context_offsets.tolist() == [0, *inside, window.count]
        assert window.context_offsets.dtype == np.int32
        assert window.continues == (done not in starts)
        done += window.count
    assert done == everything.size


@given(
    sizes=st.lists(st.one_of(st.integers(0, 400), st.integers(0, 9000)), min_size=1, max_size=12),
    window_tokens=st.integers(1024, 3000),
    lines=st.booleans(),
    seed=st.integers(0, 9),
)
def test_full_windows_are_cut_at_whole_tiles_and_padded_little(
    sizes: list[int], window_tokens: int, lines: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # A new line every 300 bytes or so.
    content = np.where(rng.random(sum(sizes)) < 1 / 300, 10, 97).astype(np.uint8)
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    capacity = window_capacity(window_tokens)
    assert (capacity % 128, window_tokens - capacity < 128) == (0, True)
    windows = list(cut_windows(content, offsets, window_tokens, reset_at_newlines=lines, pad=True))
    begun = 0
    for index, window in enumerate(windows):
        padding = window.padding.stop - window.padding.start
        assert window.tokens.size == capacity
        assert padding < 128 or index == len(windows) - 1
        assert (window.tokens[window.padding] == BOE_ID).all()
        bounds = window.context_offsets.tolist()
        assert (bounds[0], bounds[-1]) == (0, capacity)
        assert padding == 0 or {window.padding.start, window.padding.stop} <= set(bounds)
        if window.continues:
            assert (window.first_token - begun) % 128 == 0
        real = window.without_padding(window.tokens)
        places = np.flatnonzero((real == BOS_ID) | (lines & (real == NEWLINE)))
        begun = window.first_token + int(places[-1]) if places.size else begun
        # Contexts begin where their first tokens stand, and nowhere else but at the padding.
        moved = np.where(places < window.padding.start, places, places + padding)
        assert set(moved.tolist()) | {0, capacity, window.padding.start, window.padding.stop} >= set(bounds)
        assert set(moved.tolist()) <= set(bounds)
        # A context that goes on in the next window is the last one, so that the model's state is its own.
        if index + 1 < len(windows) and windows[index + 1].continues:
            assert padding == 0 or window.padding.stop < capacity


def test_a_window_holds_a_token() -> None:
    with pytest.raises(InputError, match="window_tokens is 0"):
        list(cut_windows(np.empty(0, np.uint8), np.zeros(1, np.int64), 0))
