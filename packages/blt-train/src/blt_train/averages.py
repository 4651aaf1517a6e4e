"""The averaged weights of a checkpoint, in place of the last ones."""

from __future__ import annotations

from pathlib import Path

from blt_model import BLT, ByteLM
from blt_train.checkpoint import Section, load_section, read_trainer_state
from blt_train.errors import CheckpointError


def take_averages(model: BLT | ByteLM, checkpoint: Path) -> None:
    """Fill a model with the moving average of the weights that training kept.

    Args:
        model: loaded from the checkpoint.
        checkpoint: its directory.

    Raises:
        CheckpointError: the run kept no averages, or the file is damaged.
    """
    state = read_trainer_state(checkpoint)
    if state.config.get("optimizer", {}).get("ema_decay") is None:
        raise CheckpointError(
            f"{checkpoint}: holds no averaged weights, as optimizer.ema_decay was not set: leave out --ema"
        )
    load_section(checkpoint, Section.EMA, dict(model.named_parameters()))
