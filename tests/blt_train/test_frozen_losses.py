"""Training gives the losses it always gave; see `smoke_run` for what to do when it is meant to give others."""

from __future__ import annotations

import pytest
from tests.blt_train.smoke_run import KINDS, STEPS, TOLERANCE, frozen, losses


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_frozen_ones(kind: str) -> None:
    kept = frozen(kind)
    assert len(kept) == STEPS
    assert losses(kind) == pytest.approx(kept, rel=TOLERANCE)
    # It does learn, so that the later losses depend on every part of a step.
    assert kept[-1] < 0.6 * kept[0]
