"""Windows: every framed token once, in order, in windows of exactly the size asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_data.errors import InputError
from blt_data.framing import BOS_ID, frame
from blt_patcher.windows import cut_windows, framed_offsets


@given(
    documents=st.lists(st.binary(max_size=20), max_size=8), window_tokens=st.integers(1, 30), lead=st.binary(max_size=3)
)
def test_windows_laid_end_to_end_are_the_framed_documents(
    documents: list[bytes], window_tokens: int, lead: bytes
) -> None:
    content = np.frombuffer(lead + b"".join(documents), np.uint8)
    content_offsets = np.cumsum([len(lead), *map(len, documents)], dtype=np.int64)
    framed = [frame(document) for document in documents]
    everything = np.concatenate([np.empty(0, np.uint16), *framed])
    starts = np.cumsum([0, *(tokens.size for tokens in framed)])
    np.testing.assert_array_equal(framed_offsets(content_offsets), starts)
    windows = list(cut_windows(content, content_offsets, window_tokens))
    assert [window.tokens.size for window in windows[:-1]] == [window_tokens] * (len(windows) - 1)
    done = 0
    for window in windows:
        assert window.first_token == done
        np.testing.assert_array_equal(window.tokens, everything[done : done + window.tokens.size])
        inside = [int(start) - done for start in starts if done < start < done + window.tokens.size]
        assert window.document_offsets.tolist() == [0, *inside, window.tokens.size]
        assert window.document_offsets.dtype == np.int32
        assert window.continues == (int(window.tokens[0]) != BOS_ID)
        done += window.tokens.size
    assert done == everything.size


def test_a_window_holds_a_token() -> None:
    with pytest.raises(InputError, match="window_tokens is 0"):
        list(cut_windows(np.empty(0, np.uint8), np.zeros(1, np.int64), 0))
