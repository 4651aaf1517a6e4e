"""`trainer.json`: what a checkpoint knows besides tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from blt_model import BLT, ByteLM, ModelError
from blt_model.weights.section_reading import section_files
from blt_model.weights.section_writing import SAVE_KEY
from blt_model.weights.tensor_files import read_header
from blt_train.checkpoint.directory import checkpoint_name, resume_another
from blt_train.checkpoint.sections import Section
from blt_train.errors import CheckpointError

FORMAT_VERSION = 2
TRAINER_NAME = "trainer.json"
_FIRST_VERSION = 1
_PACKAGES = ("blt-data", "blt-model", "blt-patcher", "blt-train", "torch", "numpy")

Model = ByteLM | BLT


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Contents of `trainer.json`."""

    step: int
    """Optimizer steps done; the place in the data follows from it."""

    config: Mapping[str, Any]
    """The resolved config, as nested plain values."""

    data: Mapping[str, Any]
    """`kind` of the training shards, and `sources`: name to `fingerprint`, `provenance` and `weight`."""

    entropy_model: str | None
    """Fingerprint of the entropy model that scored the shards; null where there is none."""

    packages: Mapping[str, str]
    """Versions of the packages that wrote the checkpoint."""

    processes: int = 1
    """How many wrote it."""

    nonfinite_steps: int = 0
    """Steps so far whose update was left out because the loss or the gradient was not finite."""

    nonfinite_in_row: int = 0
    """How many of them were the last ones, without a sound step after them."""

    save: str | None = None
    """Name of the save, which the files of tensors bear too; None where an earlier version of blt-train wrote it."""

    format_version: int = FORMAT_VERSION
    """Of the checkpoint."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How the training shards were made; where there are several sources, all share scheme and entropy model."""
        first: Mapping[str, Any] = next(iter(self.data["sources"].values()))["provenance"]
        return first

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format_version": self.format_version,
            "step": self.step,
            "save": self.save,
            "processes": self.processes,
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_row": self.nonfinite_in_row,
            "config": dict(self.config),
            "data": dict(self.data),
            "entropy_model": self.entropy_model,
            "packages": dict(self.packages),
        }

    def to_text(self) -> str:
        """Return the file's content."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"


def package_versions() -> dict[str, str]:
    """Return the versions that a checkpoint records; those of packages run from a checkout are `not installed`."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Read a checkpoint's `trainer.json`, of this version or the first one.

    Args:
        checkpoint: the checkpoint's directory.

    Raises:
        CheckpointError: the file is missing or damaged, of another version, or of another save than the tensors.
    """
    path = checkpoint / TRAINER_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version not in (_FIRST_VERSION, FORMAT_VERSION):
            raise CheckpointError(
                f"{path}: has format version {version}, this blt-train reads {_FIRST_VERSION} and {FORMAT_VERSION}; "
                "use the version of blt-train that wrote it"
            )
        if version == _FIRST_VERSION:
            content["data"] = _data_of_first_version(content["data"])
        state = TrainerState(**content)
        _check_state(state)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing, so this is no training checkpoint") from error
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged; {resume_another(checkpoint)}") from error
    _check_save(checkpoint, state)
    return state


def _check_save(checkpoint: Path, state: TrainerState) -> None:
    """Refuse a directory that was put together from the files of several saves.

    Files of tensors that are missing or damaged are left to those who read them.

    Raises:
        CheckpointError: naming the file that is of another save.
    """
    name = checkpoint_name(state.step)
    if state.save not in (name, None):
        raise CheckpointError(
            f"{checkpoint / TRAINER_NAME}: is of the save {state.save}, but says step {state.step}, so it was changed; "
            f"{resume_another(checkpoint)}"
        )
    for section in Section:
        try:
            path = section_files(checkpoint, section)[0]
            if not path.is_file():
                continue
            save = read_header(path)[1].get(SAVE_KEY)
        except ModelError:
            continue
        # Earlier versions gave the files of a single process no name.
        if save != name and (save is not None or state.save is not None):
            raise CheckpointError(
                f"{path}: is of {f'the save {save}' if save else 'an unnamed save'}, but {TRAINER_NAME} of {name}, so "
                f"the directory holds files of two checkpoints; {resume_another(checkpoint)}"
            )


def _data_of_first_version(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a checkpoint of the first version, which knew one source, in today's form."""
    source = {"fingerprint": data["fingerprint"], "provenance": data["provenance"], "weight": 1.0}
    return {"kind": data["kind"], "sources": {"train": source}}


def _check_state(state: TrainerState) -> None:
    """Check that what was read has the shape that every reader of it relies on.

    Raises:
        TypeError: it has not.
        KeyError: a part is missing.
    """
    sources = state.data["sources"]
    if not isinstance(sources, dict) or not sources:
        raise TypeError("there are no sources")
    counts = (state.step, state.processes, state.nonfinite_steps, state.nonfinite_in_row)
    parts: list[tuple[object, Any]] = [
        *((count, int) for count in counts),
        (state.config, dict),
        (state.config["data"], dict),
        (state.config["data"]["sequence_tokens"], int),
        (state.data, dict),
        (state.data["kind"], str),
        (state.entropy_model, str | None),
        (state.save, str | None),
        (state.packages, dict),
    ]
    for source in sources.values():
        kinds = (("fingerprint", str), ("provenance", dict), ("weight", int | float | None))
        parts += [(source[key], kind) for key, kind in kinds]
    # JSON's true is an int to Python.
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value, kind in parts) or min(counts) < 0:
        raise TypeError("a part is of another type")
