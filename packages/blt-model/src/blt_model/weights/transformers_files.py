"""Writing a directory that transformers' `BltForCausalLM.from_pretrained` reads."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.errors import ModelError
from blt_model.weights import transformers_format
from blt_model.weights.naming import Pieces, blt_pieces, byte_lm_pieces
from blt_model.weights.native import CONFIG_FILE, sync_path
from blt_model.weights.tensor_files import INDEX_SUFFIX

MAX_SHARD_BYTES: Final = 5_000_000_000
_STEM: Final = "model"


def save_transformers(
    model: BLT | ByteLM,
    directory: str | os.PathLike[str],
    *,
    entropy_model: ByteLM | None = None,
    patching: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model in transformers' Blt format; the directory appears whole or not at all.

    Args:
        model: a BLT, or an entropy model by itself (`BltPatcher`).
        directory: made; it must not exist, or be empty.
        entropy_model: of a BLT; goes in as its patcher, which then patches in `forward`.
        patching: the patch scheme in blt-patcher's JSON form; must be `entropy` if there is an entropy model.
        max_shard_bytes: a file's size at which the next one begins.

    Raises:
        ModelError: `BltForCausalLM` does not compute this model or scheme, or the directory is not empty.
        OSError: the disk is full or not writable.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not an empty directory; name another.")
    names = transformers_format.NAMES
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in model.state_dict().values()}
    if isinstance(model, ByteLM):
        document = transformers_format.document_of_byte_lm(model.config)
        parts: list[tuple[BLT | ByteLM, Pieces]] = [(model, byte_lm_pieces(names, model.config))]
    else:
        document = transformers_format.document_of_blt(model.config, max(dtypes))
        parts = [(model, blt_pieces(names, model.config))]
        if entropy_model is not None:
            document |= _patcher_fields(entropy_model, patching)
            prefix = transformers_format.PATCHER_PREFIX
            parts.append((entropy_model, byte_lm_pieces(names, entropy_model.config, prefix)))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        _write_shards(temporary, [tensor for part in parts for tensor in _foreign_tensors(*part)], max_shard_bytes)
        (temporary / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync_path(path)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_path(target.parent)


def _patcher_fields(entropy_model: ByteLM, patching: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a configuration says of its patcher."""
    scheme = None if patching is None else patching.get("scheme")
    if patching is None or scheme != "entropy":
        raise ModelError(
            f"transformers' BltForCausalLM patches by the scheme 'entropy' alone, not {scheme!r}; export without the "
            "entropy model and give patch_lengths to forward, or export as native."
        )
    return {
        "patch_in_forward": True,
        "patching_mode": "entropy",
        "patching_threshold": patching["threshold"],
        "max_patch_length": patching.get("max_patch_length"),
        "patcher_config": transformers_format.document_of_byte_lm(entropy_model.config),
    }


def _foreign_tensors(model: BLT | ByteLM, pieces: Pieces) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        start = 0
        for piece in pieces[name]:
            rows = len(tensor) if piece.rows is None else piece.rows
            yield piece.name, tensor.detach()[start : start + rows]
            start += rows


def _write_shards(directory: Path, tensors: list[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = f"{_STEM}.safetensors" if single else f"{_STEM}-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        # A slice shares its storage with its neighbours, which safetensors refuses; one shard at a time is copied.
        copies = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in shard.items()}
        try:
            save_file(copies, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{directory / file} could not be written: {error}") from error
    if not single:
        total = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
        index_document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = directory / f"{_STEM}.safetensors{INDEX_SUFFIX}"
        path.write_text(json.dumps(index_document, indent=2) + "\n", encoding="utf-8")
