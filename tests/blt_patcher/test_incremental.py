"""The byte-at-a-time form: the same boundaries as the batch kernels, and a state that travels as JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_patcher.plain import schemes, scored_documents

from blt_data.errors import InputError
from blt_data.framing import frame
from blt_patcher import (
    SCHEMES,
    BpeScheme,
    ByteScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    IncrementalPatcher,
    PatchScheme,
    SpaceScheme,
    patch_document,
    scheme_to_json,
)

Scored = tuple[bytes, npt.NDArray[np.float16]]


def boundaries_of(lengths: npt.NDArray[np.uint16]) -> list[bool]:
    """Whether each token of a framed document starts a patch."""
    starts = np.zeros(int(lengths.sum()), bool)
    starts[np.cumsum(lengths) - lengths] = True
    return [bool(start) for start in starts]


@settings(max_examples=400)
@given(scheme=schemes, scored=scored_documents())
def test_byte_by_byte_equals_batch(scheme: PatchScheme, scored: Scored) -> None:
    content, entropies = scored
    tokens = frame(content)
    patcher = IncrementalPatcher(scheme)
    answers = [patcher.push(int(token), float(nats)) for token, nats in zip(tokens, entropies, strict=True)]
    assert [True, *answers[:-1]] == boundaries_of(patch_document(scheme, content, entropies))
    patcher.reset()
    assert answers == [patcher.push(int(token), float(nats)) for token, nats in zip(tokens, entropies, strict=True)]


@settings(max_examples=100)
@given(scheme=schemes, scored=scored_documents(), data=st.data())
def test_state_travels_as_json(scheme: PatchScheme, scored: Scored, data: st.DataObject) -> None:
    content, entropies = scored
    pairs = [(int(token), float(nats)) for token, nats in zip(frame(content), entropies, strict=True)]
    cut = data.draw(st.integers(0, len(pairs)))
    whole = IncrementalPatcher(scheme)
    answers = [whole.push(*pair) for pair in pairs]
    first = IncrementalPatcher(scheme)
    for pair in pairs[:cut]:
        first.push(*pair)
    text = json.dumps(first.state(), allow_nan=False)
    assert len(text) < 400
    second = IncrementalPatcher.from_state(json.loads(text))
    assert second.scheme == scheme
    assert [second.push(*pair) for pair in pairs[cut:]] == answers[cut:]


def test_long_patches_are_split_at_uint16() -> None:
    patcher = IncrementalPatcher(EntropyScheme(threshold=1.0))
    starts = [0] + [index + 1 for index in range(140_000) if patcher.push(4 if index else 1, 0.0)]
    assert starts == [0, 1, 65_536, 131_071]


def test_entropies_are_rounded_before_any_decision() -> None:
    # 1.33 rounds to 1.330078125 in float16, above a threshold of 1.33; 1.3299 rounds to 1.330078125 as well.
    patcher = IncrementalPatcher(EntropyScheme(threshold=1.33))
    assert [patcher.push(token, 1.3299) for token in (1, 40, 41)] == [True, True, True]
    # Both round to the same float16, so nothing rises.
    rising = IncrementalPatcher(EntropyMonotonicScheme(relative_threshold=0.0))
    assert [rising.push(token, nats) for token, nats in [(1, 1.0), (40, 2.0), (41, 2.0001)]] == [True, True, False]


def test_schemes_without_entropies_need_none() -> None:
    patcher = IncrementalPatcher(SpaceScheme())
    assert [patcher.push(int(token)) for token in frame(b"a b")] == [True, False, True, False, True]
    assert [IncrementalPatcher(ByteScheme()).push(1)] == [True]


@pytest.mark.parametrize("entropy", [float("nan"), float("inf"), 1e6])
def test_entropies_that_are_not_finite_are_refused(entropy: float) -> None:
    patcher = IncrementalPatcher(EntropyScheme(threshold=1.0))
    with pytest.raises(InputError, match="needs a finite entropy"):
        patcher.push(1, entropy)
    with pytest.raises(InputError, match="needs a finite entropy"):
        patcher.push(1)


@pytest.mark.parametrize("token", [-1, 260])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(InputError, match="outside the vocabulary"):
        IncrementalPatcher(ByteScheme()).push(token)


def test_the_form_of_states_is_pinned() -> None:
    patcher = IncrementalPatcher(EntropyScheme(threshold=1.5))
    for token, nats in [(1, 3.0), (101, 0.25)]:
        patcher.push(token, nats)
    assert patcher.state() == {
        "version": 1,
        "scheme": {"scheme": "entropy", "version": 1, "max_patch_length": None, "threshold": 1.5},
        "tokens": 2,
        "length": 1,
        "entropy": 0.25,
        "space_like": False,
    }


GOOD_STATE = IncrementalPatcher(ByteScheme()).state()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 2}, "has version 2, but this blt-patcher reads version 1"),
        ({"scheme": scheme_to_json(SpaceScheme())}, "is of scheme .*space"),
        ({"tokens": "1"}, "is not one; it must have exactly tokens, length, entropy, space_like"),
        ({"tokens": True}, "it must have exactly"),
        ({"more": 1}, "it must have exactly"),
        ({"length": 3}, "no patcher gets into it"),
        ({"tokens": 1, "length": -1}, "no patcher gets into it"),
        ({"entropy": math.nan}, "no patcher gets into it"),
    ],
)
def test_states_that_are_none_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        IncrementalPatcher(ByteScheme()).restore({**GOOD_STATE, **changes})


def test_a_state_must_be_whole() -> None:
    for key in ("tokens", "version", "scheme"):
        with pytest.raises(InputError, match="patcher state"):
            IncrementalPatcher(ByteScheme()).restore({name: GOOD_STATE[name] for name in GOOD_STATE if name != key})
    with pytest.raises(InputError, match="names no scheme"):
        IncrementalPatcher.from_state({})


def test_schemes_that_look_ahead_are_refused() -> None:
    assert [name for name, cls in SCHEMES.items() if not cls.incremental] == ["bpe"]
    with pytest.raises(InputError, match="scheme bpe is not incremental: bytes to come may change"):
        IncrementalPatcher(BpeScheme(tokenizer=64 * "a"))
