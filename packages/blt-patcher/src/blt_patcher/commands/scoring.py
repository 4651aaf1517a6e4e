"""What the subcommands that score documents share: loading the entropy model, calibrating on a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
import numpy as np
import numpy.typing as npt

from blt_data.console import progress
from blt_data.errors import InputError
from blt_patcher.calibrate import Calibration, EntropyBasedScheme, Sample
from blt_patcher.schemes import PatchScheme

if TYPE_CHECKING:
    from blt_patcher.entropies import EntropyScorer

#: Distance of the nearest mean from the target, as a share of it, that is worth a warning.
_MISS: Final = 0.05


def as_entropy_based(scheme: PatchScheme) -> EntropyBasedScheme:
    """Return a scheme that has a threshold.

    Raises:
        InputError: it has none.
    """
    if not isinstance(scheme, EntropyBasedScheme):
        raise InputError(f"scheme {scheme.name} has no threshold to find; leave --target-patch-length out")
    return scheme


def score_sample(sample: Sample, scorer: EntropyScorer) -> npt.NDArray[np.float16]:
    """Return the sample's entropies, float16 [N + 2D] nats, showing progress."""
    tokens = sample.content.size + 2 * (sample.content_offsets.size - 1)
    with progress("scoring the sample", tokens, "B") as bar:
        return scorer.score(sample.content, sample.content_offsets, name="the sample", advance=bar.advance)


def warn_of_miss(found: Calibration) -> None:
    """Say so on standard error if no threshold came near the target on the sample."""
    drift = found.mean_patch_length / found.target_patch_length - 1
    if abs(drift) > _MISS:
        click.echo(
            f"warning: the nearest mean patch length is {found.mean_patch_length:.4g}, {100 * drift:+.0f}% from the "
            f"target of {found.target_patch_length:g}; a larger sample may come nearer",
            err=True,
        )
