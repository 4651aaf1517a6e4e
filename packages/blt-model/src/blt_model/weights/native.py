"""The native model directory: `config.json` and `model.safetensors`.

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.config import BLTConfig, ModelConfig, from_json, to_json
from blt_model.errors import ModelError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
METADATA_KEY = "blt_model.config"


def _canonical(config: ModelConfig) -> str:
    return json.dumps(to_json(config), sort_keys=True)


def _sync(path: Path) -> None:
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
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


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
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    # One entry only: safetensors writes several in random order, and equal models should give equal files.
    metadata = {METADATA_KEY: _canonical(model.config)}

    def write_weights(path: Path) -> None:
        try:
            save_file(tensors, path, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{target / WEIGHTS_FILE} could not be written: {error}") from error

    _write(target / WEIGHTS_FILE, write_weights)
    text = json.dumps(to_json(model.config), indent=2) + "\n"
    _write(target / CONFIG_FILE, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def build_model(config: ModelConfig) -> ByteLM | BLT:
    """A model of this architecture with fresh weights, on torch's default device."""
    return BLT(config) if isinstance(config, BLTConfig) else ByteLM(config)


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


def _read_tensors(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], str]:
    """All tensors of a file, and the configuration in its metadata ("" if there is none)."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; save the model again.")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name).to(dtype=dtype) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get(METADATA_KEY, "")
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged or no safetensors file ({error}); save the model again.") from None


def _check_names(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelError(f"{path} lacks the tensor {name}; it does not belong to its config.json.")
        if tuple(tensors[name].shape) != shape:
            raise ModelError(
                f"{path} holds {name} of shape {list(tensors[name].shape)} where config.json needs {list(shape)}; it "
                "does not belong to its config.json."
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise ModelError(f"{path} holds {extra[0]}, which the model of config.json does not have.")


def load_model(
    directory: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ByteLM | BLT:
    """Read a model directory.

    Args:
        directory: what save_model wrote.
        device: where the weights go.
        dtype: convert the weights; None keeps what was saved.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: a file is missing, damaged or does not belong to the other; the message names it.
    """
    source = Path(directory)
    config = _read_config(source / CONFIG_FILE)
    path = source / WEIGHTS_FILE
    tensors, stored = _read_tensors(path, device, dtype)
    with torch.device("meta"):
        model = build_model(config)
    _check_names(model, tensors, path)
    if stored and stored != _canonical(config):
        raise ModelError(f"{path} was saved with another configuration than {CONFIG_FILE} beside it; save both again.")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


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
