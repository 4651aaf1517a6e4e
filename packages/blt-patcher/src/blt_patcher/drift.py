"""Drift: a directory whose mean patch length is not the one that its threshold was calibrated for.

Calibration is exact on its sample and blind to the rest. Data of another sort (another language, code, markup), or
entropies of a model that has changed, give another mean, and with it another cost per byte than was planned.
"""

from __future__ import annotations

import math
from typing import Final

from blt_data import Manifest
from blt_data.framing import FRAME_TOKENS

#: Distance of the mean from the target, as a share of the target, that is worth a warning.
DRIFT_TOLERANCE: Final = 0.2


def target_patch_length(manifest: Manifest) -> float | None:
    """Return the mean patch length that a patched directory was calibrated for, or None if it was not.

    Args:
        manifest: of patched shards; the target is in its provenance, under `calibration`.
    """
    calibration = manifest.provenance.get("calibration")
    target = calibration.get("target_patch_length") if isinstance(calibration, dict) else None
    if isinstance(target, bool) or not isinstance(target, (int, float)):
        return None
    return float(target) if math.isfinite(target) and target >= 1 else None


def mean_patch_length(manifest: Manifest) -> float | None:
    """Return the framed tokens per patch of a patched directory, or None where it has no patch."""
    patches = manifest.patches
    return (manifest.bytes + FRAME_TOKENS * manifest.documents) / patches if patches else None


def drift_warning(manifest: Manifest, *, tolerance: float = DRIFT_TOLERANCE) -> str | None:
    """Return one sentence if a directory's mean patch length is far from its target, else None.

    For every command that makes or counts patches: print it to standard error after `warning: `. The target is there
    when the directory was made with `--target-patch-length` or with a scheme file of `blt-patch calibrate`.

    Args:
        manifest: of patched shards.
        tolerance: what is far, as a share of the target.
    """
    target, mean = target_patch_length(manifest), mean_patch_length(manifest)
    if target is None or mean is None or abs(mean / target - 1) <= tolerance:
        return None
    return (
        f"the mean patch length is {mean:.4g}, {100 * (mean / target - 1):+.0f}% from the target of {target:g} that "
        "the threshold was calibrated for; these documents are unlike the sample, so calibrate on these or on both"
    )
