"""Checkpoints: model, optimizer and trainer state in one directory, complete or absent, without pickle.

    RUN/checkpoints/step-00000400/config.json, model.safetensors   a model directory of blt_model
                                  optimizer.safetensors            AdamW's moments, by parameter name
                                  trainer.json                     step, config, what data it was trained on
    RUN/latest -> checkpoints/step-00000400                        moved when the checkpoint is durable

The order of data follows from the step, and training draws no random number after the initial weights, so neither a
loader's nor a generator's state needs keeping.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from blt_model import BLT, ByteLM
from blt_model.weights.native import save_model
from blt_train.errors import CheckpointError
from blt_train.files import point_link, publish_directory
from blt_train.parallel.rows import placed_as, whole
from blt_train.parallel.seeding import meta_model

FORMAT_VERSION = 1
CHECKPOINTS_NAME = "checkpoints"
LATEST_NAME = "latest"
TRAINER_NAME = "trainer.json"
OPTIMIZER_NAME = "optimizer.safetensors"
_TEMPORARY_PREFIX = ".tmp-"
_PACKAGES = ("blt-data", "blt-model", "blt-patcher", "blt-train", "torch", "numpy")

Model = ByteLM | BLT


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Contents of `trainer.json`."""

    step: int
    """Optimizer steps done."""

    config: Mapping[str, Any]
    """The resolved config, as nested plain values."""

    data: Mapping[str, Any]
    """Of the training shards: `fingerprint`, `kind` and `provenance`."""

    entropy_model: str | None
    """Fingerprint of the entropy model that scored the shards; null where there is none."""

    packages: Mapping[str, str]
    """Versions of the packages that wrote the checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "config": dict(self.config),
            "data": dict(self.data),
            "entropy_model": self.entropy_model,
            "packages": dict(self.packages),
        }


def package_versions() -> dict[str, str]:
    """Return the versions that a checkpoint records; those of packages run from a checkout are `not installed`."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def checkpoint_directory(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that a path names: a checkpoint itself, or a run directory's latest.

    Args:
        path: a checkpoint or model directory, or a run directory.

    Raises:
        CheckpointError: there is neither.
    """
    directory = Path(path)
    latest = directory / LATEST_NAME
    if latest.is_symlink() and not latest.exists():
        raise CheckpointError(f"{latest}: points to a checkpoint that is gone; point it to one in {CHECKPOINTS_NAME}/")
    if latest.exists():
        return latest.resolve()
    if (directory / "config.json").is_file():
        return directory.resolve()
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such checkpoint or run directory")
    raise CheckpointError(f"{directory}: holds no checkpoint; name a run directory or a checkpoint within it")


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Read a checkpoint's `trainer.json`.

    Args:
        checkpoint: the checkpoint's directory.

    Raises:
        CheckpointError: the file is missing or damaged, or of another version.
    """
    path = checkpoint / TRAINER_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: has format version {version}, this blt-train reads {FORMAT_VERSION}")
        state = TrainerState(**content)
        _check_state(state)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing, so this is no training checkpoint") from error
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged; resume from another checkpoint") from error
    return state


def _check_state(state: TrainerState) -> None:
    """Check that what was read has the shape that every reader of it relies on.

    Raises:
        TypeError: it has not.
        KeyError: a part is missing.
    """
    parts = (
        (state.step, int),
        (state.config, dict),
        (state.config["data"], dict),
        (state.config["data"]["sequence_tokens"], int),
        (state.data, dict),
        (state.data["fingerprint"], str),
        (state.data["kind"], str),
        (state.data["provenance"], dict),
        (state.entropy_model, str | None),
        (state.packages, dict),
    )
    # JSON's true is an int to Python.
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value, kind in parts) or state.step < 0:
        raise TypeError("a part is of another type")


class RunDirectory:
    """A run directory and its checkpoints; only the first rank writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the directory; nothing is made yet.

        Args:
            path: the run directory.
        """
        self.path = Path(path)

    def lock(self) -> IO[str]:
        """Make the directory and claim it for this process until the returned file is closed.

        Raises:
            CheckpointError: another process trains in it.
        """
        (self.path / CHECKPOINTS_NAME).mkdir(parents=True, exist_ok=True)
        file = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise CheckpointError(f"{self.path}: another process is training here; choose another run=") from error
        return file

    def latest(self) -> Path | None:
        """Return the latest checkpoint's directory, or None where there is none yet.

        Raises:
            CheckpointError: `latest` points to nothing, or is no link.
        """
        link = self.path / LATEST_NAME
        if not link.is_symlink() and link.exists():
            raise CheckpointError(
                f"{link}: is no symbolic link, perhaps because a copy followed it; delete it to go on from the newest "
                f"checkpoint in {CHECKPOINTS_NAME}/"
            )
        return checkpoint_directory(self.path) if link.is_symlink() else None

    def restore_latest(self) -> None:
        """Point `latest` to the newest checkpoint where it is missing: lost in a copy, or not yet made when killed."""
        finished = self._finished()
        if finished and not os.path.lexists(self.path / LATEST_NAME):
            point_link(self.path / LATEST_NAME, f"{CHECKPOINTS_NAME}/{finished[-1].name}")

    def clean(self) -> None:
        """Remove what a killed process left: unfinished checkpoints, and finished ones that `latest` never reached."""
        latest = self.latest()
        unfinished = (self.path / CHECKPOINTS_NAME).glob(f"{_TEMPORARY_PREFIX}step-*")
        newer = [directory for directory in self._finished() if latest is None or directory.name > latest.name]
        for directory in (*unfinished, *newer):
            shutil.rmtree(directory)

    def _finished(self) -> list[Path]:
        """Return the checkpoints of this run, oldest first; directories that a user named otherwise are not ours."""
        folder = self.path / CHECKPOINTS_NAME
        return sorted(path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]{8,}", path.name))

    def save(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        state: TrainerState,
        keep_last: int,
        *,
        is_main: bool = True,
    ) -> Path:
        """Write a checkpoint, make it durable, move `latest` to it, and remove the oldest; all ranks call this.

        Args:
            model: without wrappers, perhaps sharded.
            optimizer: of the model's parameters.
            state: the rest.
            keep_last: how many checkpoints stay.
            is_main: whether this rank writes.

        Returns:
            The checkpoint's directory.
        """
        folder = self.path / CHECKPOINTS_NAME
        name = f"step-{state.step:08d}"
        weights = _gathered(model.state_dict(), is_main)
        moments = _gathered(optimizer_tensors(model, optimizer), is_main)
        if not is_main:
            return folder / name
        temporary = folder / (_TEMPORARY_PREFIX + name)
        if temporary.exists():
            shutil.rmtree(temporary)
        save_model(_plain(model, weights), temporary)
        save_file(moments, temporary / OPTIMIZER_NAME)
        text = json.dumps(state.to_json(), indent=2, ensure_ascii=False) + "\n"
        (temporary / TRAINER_NAME).write_text(text, encoding="utf-8")
        publish_directory(temporary, folder / name)
        point_link(self.path / LATEST_NAME, f"{CHECKPOINTS_NAME}/{name}")
        for old in self._finished()[:-keep_last]:
            shutil.rmtree(old)
        return folder / name


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as `<moment>.<parameter name>` tensors, plain or sharded as it is."""
    return {
        f"{moment}.{name}": value.detach()
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def _gathered(tensors: Mapping[str, torch.Tensor], is_main: bool) -> dict[str, torch.Tensor]:
    """Return whole tensors on the CPU of the first rank, one after the other; nothing on the others."""
    result = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if is_main:
            result[name] = gathered.cpu().contiguous()
    return result


def _plain(model: Model, weights: Mapping[str, torch.Tensor]) -> Model:
    """Return a model on the CPU with these weights."""
    plain, _ = meta_model(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill an optimizer with a checkpoint's state.

    Args:
        checkpoint: the checkpoint's directory.
        model: without wrappers, on its device.
        optimizer: fresh, of the model's parameters.

    Raises:
        CheckpointError: the file is missing or damaged, or is of other parameters.
    """
    path = checkpoint / OPTIMIZER_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is missing or damaged; resume from another checkpoint") from error
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition(".")
        by_name.setdefault(name, {})[moment] = value.clone()
    for name, parameter in model.named_parameters():
        for moment, value in by_name.get(name, {}).items():
            if value.shape == parameter.shape:
                by_name[name][moment] = placed_as(value, parameter)
    if sorted(by_name) != sorted(ordered):
        raise CheckpointError(f"{path}: holds another model's state; resume from another checkpoint")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: by_name[name] for i, name in enumerate(ordered)}, "param_groups": groups})
