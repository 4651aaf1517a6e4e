"""A model with what it needs to be run: its patch scheme and its entropy model, wherever they are kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blt_model
from blt_model import BLT, ByteLM
from blt_model.weights.loading import ENTROPY_MODEL_DIRECTORY, PATCHING_FILE
from blt_model.weights.native import load_model
from blt_patcher import PatchScheme, scheme_from_json
from blt_train.averages import take_averages
from blt_train.checkpoint import LATEST_NAME, TRAINER_NAME, TrainerState, checkpoint_directory, read_trainer_state
from blt_train.errors import CheckpointError, ConfigError
from blt_train.inputs import open_entropy_model
from blt_train.resume import ENTROPY_MODEL_NAME
from blt_train.runtime import choose_device

RESET_KEY = "reset_at_newlines"
"""Key of provenance and of an exported patching.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedModel:
    """A model that is ready to run, in evaluation mode."""

    model: BLT | ByteLM
    scheme: PatchScheme | None
    """Of a BLT: how its training data was patched."""
    entropy_model: ByteLM | None
    """Of a BLT whose scheme needs entropies."""
    reset_at_newlines: bool = False
    """Whether the entropy model's context began anew at every newline when the training data was scored."""
    source: Path
    """The directory that it was read from."""


def open_model(
    source: str | os.PathLike[str],
    *,
    entropy_model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    averaged: bool = False,
) -> OpenedModel:
    """Open a model of a training run, or a model directory of any format that blt-model reads.

    Args:
        source: a run directory, a checkpoint in it, a model directory (ours, transformers' or the released layout), or
            a repository of the Hugging Face hub.
        entropy_model: the model that scored the training data; None for the one that comes with the model.
        device: `auto`, `cpu` or `cuda`.
        averaged: take the moving average of the weights, which a run keeps where `optimizer.ema_decay` is set.

    Raises:
        CheckpointError: there is no such model, or a BLT's patch scheme, its entropy model or the average is missing.
        ConfigError: the entropy model is another than the one that scored the training data, or is none.
        ModelError: the weights are damaged or of an unknown format.
    """
    path = Path(source)
    if (path / TRAINER_NAME).exists() or (path / LATEST_NAME).is_symlink() or (path / LATEST_NAME).exists():
        return _open_trained(checkpoint_directory(path), entropy_model, device, averaged=averaged)
    if averaged:
        raise CheckpointError(f"{path}: is no run or checkpoint, which alone have averaged weights: leave out --ema")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "params.json")):
        checkpoint_directory(path)  # says what is missing
    return _open_loaded(source, entropy_model, device)


def _open_trained(
    directory: Path, entropy_model: str | os.PathLike[str] | None, device: str, *, averaged: bool
) -> OpenedModel:
    chosen = choose_device(device)
    model = load_model(directory, device=chosen)
    if averaged:
        take_averages(model, directory)
    scheme, scorer, resets = None, None, False
    if not isinstance(model, ByteLM):
        if not (directory / TRAINER_NAME).exists():
            return _open_loaded(directory, entropy_model, device)
        state = read_trainer_state(directory)
        scheme = _scheme_of(directory, state)
        scored_by = state.provenance.get("entropy_model")
        resets = isinstance(scored_by, dict) and bool(scored_by.get(RESET_KEY, False))
        if state.entropy_model is not None or entropy_model is not None:
            copy = directory.parent.parent / ENTROPY_MODEL_NAME
            if entropy_model is None and not copy.exists():
                raise CheckpointError(f"{copy}: is missing; name the model that scored the training data")
            scorer = open_entropy_model(entropy_model or copy, state.entropy_model, data="the training data")
            scorer.to(chosen)
    return OpenedModel(model=model, scheme=scheme, entropy_model=scorer, reset_at_newlines=resets, source=directory)


def _open_loaded(
    source: str | os.PathLike[str], entropy_model: str | os.PathLike[str] | None, device: str
) -> OpenedModel:
    chosen = choose_device(device)
    if not Path(source).exists() and os.fspath(source).count("/") != 1:
        raise CheckpointError(f"{os.fspath(source)}: no such checkpoint or run directory")
    loaded = blt_model.load(source, device=chosen)
    if isinstance(loaded.model, ByteLM):
        return OpenedModel(model=loaded.model, scheme=None, entropy_model=None, source=loaded.directory)
    if loaded.patching is None:
        raise CheckpointError(
            f"{loaded.directory}: has no {TRAINER_NAME} and no {PATCHING_FILE}, which name the patch scheme; name a "
            "run directory, a checkpoint within it, or a model that blt-train export wrote"
        )
    patching = dict(loaded.patching)
    resets = bool(patching.pop(RESET_KEY, False))
    try:
        scheme = scheme_from_json(patching)
    except ValueError as error:
        raise CheckpointError(f"{loaded.directory}: names no patch scheme ({error})") from error
    scorer = loaded.entropy_model
    if entropy_model is not None:
        other = blt_model.load(entropy_model, device=chosen).model
        if not isinstance(other, ByteLM):
            raise ConfigError(f"{os.fspath(entropy_model)}: holds a BLT, not an entropy model; name a byte LM")
        scorer = other
    if scheme.needs_entropies and scorer is None:
        raise CheckpointError(
            f"{loaded.directory}: holds no {ENTROPY_MODEL_DIRECTORY}; name the model that finds its patches with "
            "--entropy-model"
        )
    return OpenedModel(
        model=loaded.model,
        scheme=scheme,
        entropy_model=scorer,
        reset_at_newlines=resets,
        source=loaded.directory,
    )


def _scheme_of(checkpoint: Path, state: TrainerState) -> PatchScheme:
    """Return the patch scheme of the training data."""
    scheme: Any = state.provenance.get("scheme")
    try:
        return scheme_from_json(scheme)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint / TRAINER_NAME}: names no patch scheme ({error})") from error
