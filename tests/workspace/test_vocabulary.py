"""The token ids stand in two packages, because blt_model imports no sibling; they must never drift apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import blt_data.framing
from blt_data import InputError, frame, unframe


@given(st.binary(max_size=300))
def test_frame_round_trip(content: bytes) -> None:
    tokens = frame(content)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [1, *(byte + 4 for byte in content), 2]
    assert unframe(tokens) == content


def test_unframe_refuses_ids_outside_the_vocabulary() -> None:
    with pytest.raises(InputError, match="260"):
        unframe(np.array([1, 260]))


def test_the_two_vocabularies_are_one() -> None:
    import blt_model.vocabulary

    for name in ("BOE_ID", "BOS_ID", "EOS_ID", "RESERVED_ID", "BYTE_OFFSET", "VOCABULARY_SIZE"):
        assert getattr(blt_model.vocabulary, name) == getattr(blt_data.framing, name)
