"""Filling a model from files, one tensor at a time: what is in memory is the model and one small buffer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.config import BLTConfig, ModelConfig
from blt_model.errors import ModelError
from blt_model.weights.naming import Piece, Pieces
from blt_model.weights.tensor_files import TensorFiles

_SHOWN = 5


def build_model(config: ModelConfig) -> ByteLM | BLT:
    """A model of this architecture with fresh weights, on torch's default device."""
    return BLT(config) if isinstance(config, BLTConfig) else ByteLM(config)


def load_streaming(
    config: ModelConfig,
    files: TensorFiles,
    *,
    pieces: Pieces | None,
    where: Path,
    ignored: Collection[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> ByteLM | BLT:
    """Build a model and fill it from files.

    Args:
        config: its architecture.
        files: the tensors.
        pieces: where ours are in them; None if the names are ours.
        where: the directory or file to name in messages.
        ignored: foreign tensors that are left where they are.
        device: where the weights go.
        dtype: converts the weights; None keeps each tensor's own.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: tensors are missing, extra or of other shapes than the configuration says; all are counted and the
            first few named.
    """
    with torch.device("meta"):
        model = build_model(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: (Piece(name),) for name in shapes} if pieces is None else pieces
    _check(shapes, found, files, where, ignored)
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        parts = found[name]
        kind = dtype or files.tensors[parts[0].name].dtype
        tensor = torch.empty(shape, dtype=kind, device=device)
        start = 0
        for part in parts:
            rows = files.tensors[part.name].shape[0]
            files.read(part.name, tensor[start : start + rows])
            start += rows
        weights[name] = tensor
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _check(
    shapes: Mapping[str, tuple[int, ...]], pieces: Pieces, files: TensorFiles, where: Path, ignored: Collection[str]
) -> None:
    """Refuse a checkpoint that is not exactly what the configuration needs."""
    missing, misshaped, used = [], [], set(ignored)
    for name, shape in shapes.items():
        for part in pieces[name]:
            used.add(part.name)
            info = files.tensors.get(part.name)
            needed = shape if part.rows is None else (part.rows, *shape[1:])
            if info is None:
                missing.append(part.name)
            elif info.shape != needed:
                misshaped.append(f"{part.name} ({list(info.shape)} where {list(needed)} is needed)")
    extra = sorted(set(files.tensors) - used)
    findings = [
        f"{what} {_some(names)}"
        for what, names in (("it lacks", missing), ("it holds other shapes:", misshaped), ("it also holds", extra))
        if names
    ]
    if findings:
        raise ModelError(f"{where} does not hold the model of its configuration: {'; '.join(findings)}.")


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
