"""What can go wrong in training, as far as a user can mend it; every message is one sentence."""

from __future__ import annotations

from blt_data.errors import InputError


class ConfigError(InputError):
    """A config field is unknown, of the wrong type, out of range, or at odds with the data or the launch."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, or belongs to another model, other data or another config."""


class TrainingError(InputError):
    """Training cannot go on: the loss is no longer finite, or a process of the job failed."""


#: Exit status of a job that SIGTERM ended, as shells count it.
EXIT_SIGTERM = 143
