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

#: Exit status of a job that SIGUSR1 ended, the signal of a time limit that comes near: its checkpoint is written, and
#: the same command goes on from it (`EX_TEMPFAIL`, by which batch scripts know to requeue the job).
EXIT_REQUEUE = 75
