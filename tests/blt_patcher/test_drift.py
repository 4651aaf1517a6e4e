"""A directory's mean patch length against the one it was meant to have."""

from __future__ import annotations

from typing import Any

import pytest

from blt_data import Manifest, ShardEntry, ShardKind
from blt_patcher.drift import drift_warning, mean_patch_length, target_patch_length


def manifest(target: Any, *, tokens: int = 1000, patches: int = 250) -> Manifest:
    entry = ShardEntry(
        name="shard-00000.arrow",
        documents=1,
        bytes=tokens - 2,
        patches=patches,
        entropies=False,
        payload_sha256="",
        file_bytes=0,
        file_crc32="",
    )
    calibration = None if target is None else {"target_patch_length": target}
    return Manifest(kind=ShardKind.PATCHED, shards=(entry,), provenance={"calibration": calibration})


@pytest.mark.parametrize(("target", "warns"), [(4.0, False), (5.0, False), (5.001, True), (3.4, False), (3.3, True)])
def test_more_than_a_fifth_is_told(target: float, warns: bool) -> None:
    warning = drift_warning(manifest(target))
    assert (warning is not None) == warns
    if warning is not None:
        assert f"the mean patch length is 4, {100 * (4 / target - 1):+.0f}% from the target of {target:g}" in warning


def test_without_a_target_or_patches_there_is_no_drift() -> None:
    for target in (None, "4", True, float("nan"), 0.5, [4]):
        assert target_patch_length(manifest(target)) is None
        assert drift_warning(manifest(target)) is None
    assert target_patch_length(Manifest(kind=ShardKind.PATCHED, shards=(), provenance={"calibration": "x"})) is None
    assert mean_patch_length(manifest(4, tokens=2, patches=0)) is None
    assert drift_warning(manifest(4, tokens=2, patches=0)) is None
