"""From options to a scheme: what is complete, what is left to calibration, and what contradicts itself."""

from __future__ import annotations

import math
from typing import Any

import pytest

from blt_data.errors import InputError
from blt_patcher import (
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
)
from blt_patcher.scheme_options import SchemeOptions, resolve_scheme


@pytest.mark.parametrize(
    ("options", "scheme", "free"),
    [
        ({"threshold": 1.5}, EntropyScheme(threshold=1.5), None),
        ({"threshold": 0.0, "max_patch_length": 8}, EntropyScheme(threshold=0.0, max_patch_length=8), None),
        ({"target_patch_length": 4.5}, EntropyScheme(threshold=0.0), "threshold"),
        (
            {"scheme": "entropy-monotonic", "relative_threshold": 0.5},
            EntropyMonotonicScheme(relative_threshold=0.5),
            None,
        ),
        (
            {"scheme": "entropy-monotonic", "target_patch_length": 4, "max_patch_length": 9},
            EntropyMonotonicScheme(relative_threshold=0.0, max_patch_length=9),
            "relative_threshold",
        ),
        (
            {"scheme": "entropy-combined", "threshold": 1.0, "relative_threshold": -0.5},
            EntropyCombinedScheme(threshold=1.0, relative_threshold=-0.5),
            None,
        ),
        (
            {"scheme": "entropy-combined", "threshold": 1.0, "target_patch_length": 4},
            EntropyCombinedScheme(threshold=1.0, relative_threshold=0.0),
            "relative_threshold",
        ),
        (
            {"scheme": "entropy-combined", "relative_threshold": 1.0, "target_patch_length": 4},
            EntropyCombinedScheme(threshold=0.0, relative_threshold=1.0),
            "threshold",
        ),
        ({"scheme": "space"}, SpaceScheme(), None),
        ({"scheme": "static", "patch_length": 4}, StaticScheme(patch_length=4), None),
        ({"scheme": "byte", "max_patch_length": 3}, ByteScheme(max_patch_length=3), None),
    ],
)
def test_schemes_from_options(options: dict[str, Any], scheme: PatchScheme, free: str | None) -> None:
    request = resolve_scheme(SchemeOptions(**options))
    assert (request.scheme, request.free) == (scheme, free)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "no patch scheme is chosen"),
        ({"relative_threshold": 1.0}, "no patch scheme is chosen"),
        ({"threshold": 1.0, "target_patch_length": 4.0}, "--threshold leaves none to find"),
        ({"scheme": "entropy-monotonic", "threshold": 1.0}, "entropy-monotonic has no --threshold"),
        ({"scheme": "entropy", "patch_length": 4, "threshold": 1.0}, "entropy has no --patch-length"),
        ({"scheme": "entropy"}, "entropy needs --threshold or --target-patch-length"),
        ({"scheme": "entropy-combined", "threshold": 1.0}, "needs --relative-threshold or --target-patch-length"),
        (
            {"scheme": "entropy-combined", "target_patch_length": 4.0},
            "fix the other one with --threshold or --relative",
        ),
        (
            {"scheme": "entropy-combined", "threshold": 1.0, "relative_threshold": 1.0, "target_patch_length": 4.0},
            "--threshold and --relative-threshold leave none to find",
        ),
        ({"scheme": "static"}, r"static needs --patch-length$"),
        ({"scheme": "static", "patch_length": 0}, "patch_length of scheme static is 0"),
        ({"scheme": "static", "target_patch_length": 4.0}, "static has no threshold to find"),
        ({"scheme": "space", "max_patch_length": 0}, "max_patch_length of scheme space is 0"),
        ({"threshold": math.nan}, "threshold of scheme entropy is nan"),
        ({"target_patch_length": 0.5}, "mean patch length of 0.5 is impossible"),
        ({"target_patch_length": math.nan}, "mean patch length of nan is impossible"),
    ],
)
def test_options_that_contradict_or_lack_something(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        resolve_scheme(SchemeOptions(**options))
