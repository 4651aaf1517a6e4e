"""The native model directory: `config.json` and `model.safetensors`.

Where several processes saved, each wrote `model-00001-of-0000N.safetensors` with the rows that it owns; `load_model`
reads both (see `section_writing`).

Every file is written to a temporary name, forced to disk and renamed, and the configuration stands in the tensor file's
metadata too, so that a directory in which the two do not belong together is recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.config import ModelConfig, from_json, to_json
from blt_model.errors import ModelError
from blt_model.weights.section_reading import SectionReader
from blt_model.weights.section_writing import Piece, section_file_name, write_section_file
from blt_model.weights.streaming import load_streaming
from blt_model.weights.tensor_files import INDEX_SUFFIX, open_weights

CONFIG_FILE = "config.json"
WEIGHTS_SECTION = "model"
WEIGHTS_FILE = section_file_name(WEIGHTS_SECTION)
METADATA_KEY = "blt_model.config"


def _canonical(config: ModelConfig) -> str:
    return json.dumps(to_json(config), sort_keys=True)


def weights_metadata(config: ModelConfig) -> dict[str, str]:
    """The metadata of a file of weights: the model's configuration.

    Args:
        config: of the model.
    """
    return {METADATA_KEY: _canonical(config)}


def config_text(config: ModelConfig) -> str:
    """The content of `config.json`.

    Args:
        config: of the model.
    """
    return json.dumps(to_json(config), indent=2) + "\n"


def sync_path(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, force it to disk, give it its name."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write(temporary)
        sync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def save_model(model: ByteLM | BLT, directory: str | os.PathLike[str]) -> None:
    """Write a model directory; each file appears whole or not at all.

    Args:
        model: whose weights are written in their own dtype.
        directory: made if missing; files of the same name are replaced.

    Raises:
        OSError: the disk is full or not writable.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    pieces = [Piece(name, tensor) for name, tensor in model.state_dict().items()]
    metadata = weights_metadata(model.config)
    _write(target / WEIGHTS_FILE, lambda path: _write_weights(path, pieces, metadata))
    text = config_text(model.config)
    _write(target / CONFIG_FILE, lambda path: _write_text(path, text))


def _write_weights(path: Path, pieces: list[Piece], metadata: dict[str, str]) -> None:
    write_section_file(path, pieces, metadata)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _read_config(path: Path) -> ModelConfig:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; name the directory of a saved model.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ModelError(f"{path} is no JSON; save the model again.") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} holds no JSON object; save the model again.")
    try:
        return from_json(document)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def load_model(
    directory: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ByteLM | BLT:
    """Read a model directory.

    Args:
        directory: what save_model wrote, or several processes together.
        device: where the weights go.
        dtype: convert the weights; None keeps what was saved.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: a file is missing, damaged or does not belong to the other; the message names it.
    """
    source = Path(directory)
    config = _read_config(source / CONFIG_FILE)
    is_indexed = (source / f"{WEIGHTS_FILE}{INDEX_SUFFIX}").is_file()
    files = open_weights(source) if is_indexed else SectionReader(source, WEIGHTS_SECTION)
    stored = files.metadata.get(METADATA_KEY)
    if stored and stored != _canonical(config):
        raise ModelError(
            f"{source} holds weights that were saved with another configuration than {CONFIG_FILE}; save both again."
        )
    return load_streaming(config, files, pieces=None, where=source, device=device, dtype=dtype)


def model_fingerprint(model: ByteLM | BLT) -> str:
    """The sha256, in hex, of a model's configuration and of every tensor's name, dtype, shape and bytes.

    Args:
        model: on any device.

    Returns:
        64 hex digits; equal exactly for equal configurations and equal weights.
    """
    digest = hashlib.sha256(_canonical(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(f"\0{header}\0".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
