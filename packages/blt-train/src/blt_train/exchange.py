"""Models in and out of training: `export` writes a directory that needs no run, `import` reads foreign weights."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from enum import StrEnum
from pathlib import Path

from blt_model import BLT, ByteLM, save_model, save_transformers
from blt_model.weights.loading import ENTROPY_MODEL_DIRECTORY, PATCHING_FILE
from blt_patcher import scheme_to_json
from blt_train.errors import ConfigError
from blt_train.files import publish_directory
from blt_train.models import RESET_KEY, OpenedModel, open_model


class ExportFormat(StrEnum):
    """Layout of an exported directory."""

    NATIVE = "native"
    """config.json, model.safetensors; of a BLT also patching.json and entropy_model/."""
    TRANSFORMERS = "transformers"
    """What transformers' `BltForCausalLM.from_pretrained` reads."""


def export_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: ExportFormat | str = ExportFormat.NATIVE,
    entropy_model: str | os.PathLike[str] | None = None,
    averaged: bool = False,
) -> OpenedModel:
    """Write a trained model, with its entropy model and patch scheme, to a directory of its own.

    A transformers directory patches in `forward` if the scheme is `entropy`; under any other scheme it holds the BLT
    alone, and `forward` takes `patch_lengths`.

    Args:
        source: what `blt_train.models.open_model` takes: a run, a checkpoint, a model directory, a hub repository.
        output: made; must not exist, or be empty.
        format: of the directory.
        entropy_model: the model that scored the training data, if it does not come with the model.
        averaged: write the moving average of the weights, which a run keeps where `optimizer.ema_decay` is set.

    Returns:
        What was written.

    Raises:
        ConfigError: the output is not empty.
        CheckpointError: there is no such model.
        ModelError: the weights are damaged, or transformers does not compute this model.
    """
    target = Path(output)
    if not os.fspath(output) or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ConfigError(f"{os.fspath(output)!r} is not empty; name a new directory as --output")
    opened = open_model(source, entropy_model=entropy_model, device="cpu", averaged=averaged)
    if ExportFormat(format) is ExportFormat.NATIVE:
        _write_native(opened, target)
        return opened
    # transformers' patcher never begins a context anew.
    by_entropy = opened.scheme is not None and opened.scheme.name == "entropy" and not opened.reset_at_newlines
    save_transformers(
        opened.model,
        target,
        entropy_model=opened.entropy_model if by_entropy else None,
        patching=None if opened.scheme is None else scheme_to_json(opened.scheme),
    )
    return opened


def _write_native(opened: OpenedModel, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        save_model(opened.model, temporary)
        if opened.entropy_model is not None:
            save_model(opened.entropy_model, temporary / ENTROPY_MODEL_DIRECTORY)
        if opened.scheme is not None:
            patching = {**scheme_to_json(opened.scheme), **({RESET_KEY: True} if opened.reset_at_newlines else {})}
            text = json.dumps(patching, indent=2) + "\n"
            (temporary / PATCHING_FILE).write_text(text, encoding="utf-8")
        if target.exists():
            target.rmdir()
        publish_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe(opened: OpenedModel) -> dict[str, object]:
    """Facts of a model for a summary table."""
    model: BLT | ByteLM = opened.model
    facts: dict[str, object] = {
        "model": "entropy LM" if isinstance(model, ByteLM) else "BLT",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if opened.scheme is not None:
        facts["patch scheme"] = json.dumps(scheme_to_json(opened.scheme))
    if opened.entropy_model is not None:
        facts["entropy model's parameters"] = sum(parameter.numel() for parameter in opened.entropy_model.parameters())
    return facts
