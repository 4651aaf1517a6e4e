"""Checkpoints: model, optimizer and trainer state in one directory, complete or absent, without pickle.

    RUN/checkpoints/step-00000400/config.json, model.safetensors   a model directory of blt_model
                                  optimizer.safetensors            the optimizer's state, by moment and parameter name
                                  ema.safetensors                  averaged weights, if the run keeps them
                                  trainer.json                     step, config, what data it was trained on
    RUN/latest -> checkpoints/step-00000400                        moved when the checkpoint is durable

Each of these safetensors files is one section. With several processes a section is in as many files as there are
processes (`model-00001-of-00008.safetensors`): each writes the rows that it owns, and later any number of processes
reads the rows that it needs.

Training draws no random number after the initial weights, and the order of data follows from the step, so neither a
generator's nor a loader's state needs keeping.
"""

from __future__ import annotations

from blt_train.checkpoint.directory import (
    CHECKPOINTS_NAME,
    LATEST_NAME,
    RunDirectory,
    checkpoint_directory,
    resume_another,
)
from blt_train.checkpoint.optimizer_state import load_optimizer, optimizer_tensors
from blt_train.checkpoint.saving import SaveFigures, Saver
from blt_train.checkpoint.sections import Section, load_section
from blt_train.checkpoint.state import (
    FORMAT_VERSION,
    TRAINER_NAME,
    Model,
    TrainerState,
    package_versions,
    read_trainer_state,
)

__all__ = [
    "CHECKPOINTS_NAME",
    "FORMAT_VERSION",
    "LATEST_NAME",
    "TRAINER_NAME",
    "Model",
    "RunDirectory",
    "SaveFigures",
    "Saver",
    "Section",
    "TrainerState",
    "checkpoint_directory",
    "load_optimizer",
    "load_section",
    "optimizer_tensors",
    "package_versions",
    "read_trainer_state",
    "resume_another",
]
