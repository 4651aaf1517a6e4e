"""Tensors in files, read straight into the memory where they are to stay.

A safetensors file (https://github.com/huggingface/safetensors#format) is an 8-byte little-endian length, a JSON header
of that length that gives each tensor's dtype, shape and byte range, and the bytes. They are read with ordinary reads
instead of a memory map: mapped pages count as the process's own memory, which would be twice the weights at the end.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from blt_model.errors import ModelError

INDEX_SUFFIX = ".index.json"
_HEADER_LIMIT = 100_000_000
_CHUNK_BYTES = 32 << 20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles(Protocol):
    """Named tensors that can be read one at a time."""

    tensors: Mapping[str, TensorInfo]

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        ...

    def read(self, name: str, destination: Tensor) -> None:
        """Fill a contiguous tensor of the stored shape, of any dtype, on any device."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: `start` counts bytes from the beginning of the file."""

    path: Path
    start: int
    info: TensorInfo


class SafetensorsFiles:
    """The tensors of one or more safetensors files."""

    def __init__(self, paths: list[Path]) -> None:
        """Read the headers.

        Args:
            paths: the files; no two may hold a tensor of the same name.

        Raises:
            ModelError: a file is missing, damaged or no safetensors file.
        """
        self.metadata: dict[str, str] = {}
        self._places: dict[str, Place] = {}
        for path in paths:
            places, metadata = read_header(path)
            for name in places:
                if name in self._places:
                    raise ModelError(f"{path} and {self._places[name].path} both hold the tensor {name}.")
            self._places |= places
            self.metadata |= metadata
        self.tensors: Mapping[str, TensorInfo] = {name: place.info for name, place in self._places.items()}

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._places[name].path

    def read(self, name: str, destination: Tensor) -> None:
        """Fill a tensor from its file.

        Args:
            name: one of `tensors`.
            destination: contiguous, of the stored shape; dtype and device are converted to, 32 MiB at a time.

        Raises:
            ModelError: the file ends before the tensor does.
        """
        place = self._places[name]
        target = destination.detach().view(-1)
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.start)
            if target.device.type == "cpu" and target.dtype == place.info.dtype:
                fill_from(file, target, place.path)
                return
            length = max(1, _CHUNK_BYTES // place.info.dtype.itemsize)
            for start in range(0, len(target), length):
                part = target[start : start + length]
                chunk = torch.empty(len(part), dtype=place.info.dtype)
                fill_from(file, chunk, place.path)
                part.copy_(chunk)


def fill_from(file: BinaryIO, target: Tensor, path: Path) -> None:
    """Fill a contiguous CPU tensor with the next bytes of a file.

    Args:
        file: raw, open at the place.
        target: of one dimension.
        path: the file's, for messages.

    Raises:
        ModelError: the file ends too early.
    """
    view = target.view(torch.uint8).numpy().data
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]  # raw files have it
        if not count:
            raise ModelError(f"{path} ends before its tensors do; fetch or save it again.")
        view = view[count:]


def read_header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Read the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        Each tensor's place, and the file's metadata.

    Raises:
        ModelError: the file is missing, damaged or no safetensors file.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing; fetch or save the model again.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no texts")
        return {name: _place(path, 8 + length, size, value) for name, value in header.items()}, metadata
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ModelError(f"{path} is damaged or no safetensors file ({reason}); fetch or save it again.") from None


def _place(path: Path, base: int, size: int, value: dict[str, Any]) -> Place:
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"its dtype {dtype!r} is not supported")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("its shapes or offsets are no whole numbers")
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    if stop - start != math.prod(shape) * info.dtype.itemsize:
        raise ValueError("a tensor's shape does not fit its bytes")
    if base + stop > size:
        raise ValueError("its tensors are cut off")
    return Place(path, base + start, info)


class PickledTensors:
    """The tensors of a PyTorch checkpoint (`.pth`), read by torch's own weights-only loader, which runs no code."""

    def __init__(self, path: Path) -> None:
        """Open the checkpoint; its tensors stay on the disk until they are read.

        Args:
            path: the file. Weights may lie under the key `model` or `state_dict`.

        Raises:
            ModelError: the file is missing, damaged, or holds anything but tensors.
        """
        if not path.is_file():
            raise ModelError(f"{path} is missing; fetch it again.")
        self._path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).split("\n", maxsplit=1)[0].rstrip(".")
            raise ModelError(f"{path} is damaged or holds more than weights ({reason}); fetch it again.") from None
        for key in ("model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ModelError(f"{path} holds no table of tensors; name a file of consolidated weights.")
        self._content: dict[str, Tensor] = content
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()
        }

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._path

    def read(self, name: str, destination: Tensor) -> None:
        """Fill a tensor of the stored shape, converting dtype and device."""
        destination.detach().copy_(self._content[name])


def open_weights(directory: Path, stem: str = "model") -> SafetensorsFiles:
    """Open `STEM.safetensors`, or the files that `STEM.safetensors.index.json` names.

    Args:
        directory: where they lie.
        stem: the name's beginning.

    Raises:
        ModelError: there is neither, or a file is missing or damaged.
    """
    index = directory / f"{stem}.safetensors{INDEX_SUFFIX}"
    if not index.is_file():
        return SafetensorsFiles([directory / f"{stem}.safetensors"])
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{index} is damaged: it holds no weight_map; fetch or save the model again.") from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ModelError(f"{index} names {name!r}, which is no file beside it; fetch or save the model again.")
    return SafetensorsFiles([directory / name for name in names])
