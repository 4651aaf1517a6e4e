"""`load`: a model directory of any known format, or a repository of the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.errors import ModelError
from blt_model.weights import meta_format, native, transformers_format
from blt_model.weights.naming import blt_pieces, byte_lm_pieces
from blt_model.weights.streaming import load_streaming
from blt_model.weights.tensor_files import PickledTensors, SafetensorsFiles, open_weights

ENTROPY_MODEL_DIRECTORY: Final = "entropy_model"
PATCHING_FILE: Final = "patching.json"

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES: Final = ["*.json", "*.safetensors", "*.pth"]


class WeightFormat(StrEnum):
    """Whose layout a model directory has."""

    NATIVE = "native"
    TRANSFORMERS = "transformers"
    META = "meta"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model and what came with it."""

    model: BLT | ByteLM
    """In evaluation mode."""
    entropy_model: ByteLM | None
    """The model that finds a BLT's patches, if the directory holds one."""
    patching: Mapping[str, Any] | None
    """The patch scheme in blt-patcher's JSON form, if the directory names one."""
    format: WeightFormat
    directory: Path


def load(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a model: ours, transformers' Blt format, or the layout that Meta released.

    Weights go from the file to where they stay, a tensor at a time. Nothing is unpickled but tensors.

    Args:
        source: a directory, or a repository of the Hugging Face hub such as `facebook/blt-1b`.
        device: where the weights go.
        dtype: converts the weights; None keeps what is stored.
        revision: branch, tag or commit of a hub repository.

    Returns:
        The model, with its entropy model and patch scheme where they are there.

    Raises:
        ModelError: there is no such directory or repository, a file is missing or damaged, or the tensors are not those
            of the configuration: which are missing, extra or mis-shaped is said.
    """
    directory = _directory(source, revision)
    document = _read_json(directory / native.CONFIG_FILE) if (directory / native.CONFIG_FILE).is_file() else None
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if document is None and not (directory / "params.json").is_file():
        raise ModelError(f"{directory} holds no config.json and no params.json; name the directory of a model.")
    try:
        if document is None or "args" in document:
            return _load_meta(directory, document, options)
        if "architecture" in document:
            return _load_native(directory, options)
        if document.get("model_type") in ("blt", "blt_patcher"):
            return _load_transformers(directory, document, options)
    except (TypeError, ValueError) as error:
        # ModelError is a ValueError with a sentence of its own; the rest comes from values of wrong types.
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{directory / native.CONFIG_FILE} holds a value that cannot be used ({error}).") from None
    raise ModelError(
        f"{directory / native.CONFIG_FILE} is of no known format (model_type {document.get('model_type')!r}); "
        "known are this package's own, transformers' blt and blt_patcher, and the released layout with 'args'."
    )


def _directory(source: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    name = os.fspath(source)
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name} is neither a directory nor a hub repository (OWNER/NAME); name one.")
    try:
        hub = import_module("huggingface_hub")
    except ModuleNotFoundError:
        raise ModelError(
            f"{name} is no directory, and to fetch it from the hub needs huggingface_hub; pip install 'blt-model[hub]'."
        ) from None
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        # The client raises errors of its HTTP library too, which differs between its releases.
        raise ModelError(_why_not_fetched(name, revision, error, hub.constants.HF_HUB_OFFLINE)) from None


def _why_not_fetched(name: str, revision: str | None, error: Exception, offline: bool) -> str:
    """Tell what the hub's client says in one sentence."""
    kind = type(error).__name__
    if offline:
        wanted = f"revision {revision} of {name}" if revision else name
        return (
            f"{wanted} is not in the local cache and HF_HUB_OFFLINE forbids to fetch it; unset it, or name a directory."
        )
    if kind == "GatedRepoError":
        return f"{name} is gated on the hub; ask for access on its page there, and give your token in HF_TOKEN."
    if kind == "RevisionNotFoundError":
        return f"{name} has no revision {revision!r} on the hub; name a branch, tag or commit of it."
    if kind == "RepositoryNotFoundError":
        return f"{name} is not on the hub, or private; check the name, or give a token that may read it in HF_TOKEN."
    reason = str(error).strip().split("\n", maxsplit=1)[0].rstrip(".")
    return f"{name} could not be fetched from the hub ({kind}: {reason}); try again, what is complete is kept."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; fetch or save the model again.") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is no JSON; fetch or save the model again.") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} holds no JSON object; fetch or save the model again.")
    return document


def _load_native(directory: Path, options: dict[str, Any]) -> LoadedModel:
    model = native.load_model(directory, **options)
    beside = directory / ENTROPY_MODEL_DIRECTORY
    entropy_model = native.load_model(beside, **options) if beside.is_dir() else None
    if entropy_model is not None and not isinstance(entropy_model, ByteLM):
        raise ModelError(f"{beside} holds no byte-lm; an entropy model is one.")
    patching = directory / PATCHING_FILE
    return LoadedModel(
        model=model,
        entropy_model=entropy_model,
        patching=_read_json(patching) if patching.is_file() else None,
        format=WeightFormat.NATIVE,
        directory=directory,
    )


def _load_transformers(directory: Path, document: dict[str, Any], options: dict[str, Any]) -> LoadedModel:
    files, names = open_weights(directory), transformers_format.NAMES
    if document["model_type"] == "blt_patcher":
        config = transformers_format.byte_lm_config(document)
        model = load_streaming(config, files, pieces=byte_lm_pieces(names, config), where=directory, **options)
        return LoadedModel(
            model=model, entropy_model=None, patching=None, format=WeightFormat.TRANSFORMERS, directory=directory
        )
    blt = transformers_format.blt_config(document)
    layer = transformers_format.encoder_cross_layer(document)
    pieces = blt_pieces(names, blt, encoder_cross_layer=layer)
    prefix = transformers_format.PATCHER_PREFIX
    of_patcher = {name for name in files.tensors if name.startswith(prefix)}
    idle = {f"{names.encoder}cross_attn_layers.{index}." for index in range(layer)}
    without_effect = {name for name in files.tensors if name.startswith(tuple(idle))} if idle else set()
    model = load_streaming(blt, files, pieces=pieces, where=directory, ignored=of_patcher | without_effect, **options)
    entropy_model = None
    if of_patcher:
        patcher = transformers_format.byte_lm_config(document.get("patcher_config") or {})
        entropy_model = load_streaming(
            patcher,
            files,
            pieces=byte_lm_pieces(names, patcher, prefix),
            where=directory,
            ignored=set(files.tensors) - of_patcher,
            **options,
        )
    return LoadedModel(
        model=model,
        entropy_model=entropy_model if isinstance(entropy_model, ByteLM) else None,
        patching=transformers_format.patching_of(document),
        format=WeightFormat.TRANSFORMERS,
        directory=directory,
    )


def _meta_files(directory: Path) -> SafetensorsFiles | PickledTensors:
    for name in ("consolidated.pth", "consolidated/consolidated.pth"):
        if (directory / name).is_file():
            return PickledTensors(directory / name)
    return open_weights(directory)


def _load_meta(directory: Path, document: dict[str, Any] | None, options: dict[str, Any]) -> LoadedModel:
    params = _read_json(directory / "params.json") if (directory / "params.json").is_file() else {}
    files, names = _meta_files(directory), meta_format.NAMES
    args = _section(document, "args") or _section(params, "model")
    byte_lm_args = args if document is not None else _section(params, "entropy_model")
    ignored = meta_format.derived_tensors(files)
    entropy_model, model = None, None
    patching = _section(_section(params, "data"), "patcher_args")
    if f"{names.embedding}.weight" in files.tensors:
        config = meta_format.byte_lm_config(byte_lm_args, files)
        pieces = byte_lm_pieces(names, config)
        model = load_streaming(config, files, pieces=pieces, where=directory, ignored=ignored, **options)
    else:
        blt = meta_format.blt_config(args, files)
        model = load_streaming(blt, files, pieces=blt_pieces(names, blt), where=directory, ignored=ignored, **options)
        if (directory / ENTROPY_MODEL_DIRECTORY).is_dir():
            beside = _load_meta(directory / ENTROPY_MODEL_DIRECTORY, None, options)
            entropy_model = beside.model if isinstance(beside.model, ByteLM) else None
            beside_params = _read_json(directory / ENTROPY_MODEL_DIRECTORY / "params.json")
            patching = patching or _section(_section(beside_params, "data"), "patcher_args")
    return LoadedModel(
        model=model,
        entropy_model=entropy_model,
        patching=meta_format.patching_of(patching) if patching else None,
        format=WeightFormat.META,
        directory=directory,
    )


def _section(document: Mapping[str, Any] | None, key: str) -> Mapping[str, Any]:
    value = (document or {}).get(key) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"{key} is no JSON object; fetch the model again.")
    return value
