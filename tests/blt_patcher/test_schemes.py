"""Schemes: checks at construction, and a JSON form that refuses what it does not know."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from tests.blt_patcher.plain import schemes

from blt_data.errors import InputError
from blt_patcher import (
    SCHEMES,
    EntropyCombinedScheme,
    EntropyScheme,
    PatchScheme,
    StaticScheme,
    describe_scheme,
    scheme_from_json,
    scheme_to_json,
)


@given(scheme=schemes)
def test_json_form_comes_back(scheme: PatchScheme) -> None:
    text = json.dumps(scheme_to_json(scheme), allow_nan=False)
    assert scheme_from_json(json.loads(text)) == scheme


def test_names_and_frozenness() -> None:
    assert sorted(SCHEMES) == ["bpe", "byte", "entropy", "entropy-combined", "entropy-monotonic", "space", "static"]
    assert [name for name, cls in SCHEMES.items() if not cls.needs_entropies] == ["space", "static", "byte", "bpe"]
    scheme = EntropyScheme(threshold=1.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.threshold = 2.0  # type: ignore[misc]
    assert hash(scheme) == hash(EntropyScheme(threshold=1.5))


def test_json_form_is_pinned() -> None:
    scheme = EntropyCombinedScheme(threshold=1.25, relative_threshold=0.5, max_patch_length=8)
    assert scheme_to_json(scheme) == {
        "scheme": "entropy-combined",
        "version": 1,
        "max_patch_length": 8,
        "threshold": 1.25,
        "relative_threshold": 0.5,
    }
    assert describe_scheme(scheme) == "entropy-combined, max_patch_length 8, threshold 1.25, relative_threshold 0.5"


@pytest.mark.parametrize("limit", [0, -1, 65_536, 2.0, True, "4"])
def test_impossible_limits_are_refused(limit: object) -> None:
    with pytest.raises(InputError, match="max_patch_length of scheme entropy is"):
        EntropyScheme(threshold=1.0, max_patch_length=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, None, "1", True])
def test_thresholds_that_are_no_numbers_are_refused(threshold: object) -> None:
    with pytest.raises(InputError, match=r"threshold of scheme entropy is .* finite number"):
        EntropyScheme(threshold=threshold)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, -3, 1.5, False])
def test_impossible_patch_lengths_are_refused(length: object) -> None:
    with pytest.raises(InputError, match="patch_length of scheme static is"):
        StaticScheme(patch_length=length)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"scheme": "word", "version": 1}, "'word' is unknown; the schemes are entropy, "),
        ({"version": 1}, "None is unknown"),
        ({"scheme": "byte", "version": 2}, "reads version 1"),
        ({"scheme": "byte"}, "has version None"),
        ({"scheme": "byte", "version": True}, "has version True"),
        ({"scheme": "entropy", "version": 1, "treshold": 1.0}, "no field 'treshold'; the nearest is 'threshold'"),
        ({"scheme": "entropy", "version": 1}, "lacks its field 'threshold'"),
        ({"scheme": "static", "version": 1, "patch_length": 0}, "from 1 up"),
    ],
)
def test_unknown_json_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        scheme_from_json(values)


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(InputError, match="must be a JSON object, not list"):
        scheme_from_json(["entropy"])  # type: ignore[arg-type]
