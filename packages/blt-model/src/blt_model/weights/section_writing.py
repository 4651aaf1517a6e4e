"""Writing a section: named tensors in one safetensors file, or in several that each hold some rows of every tensor.

    model.safetensors                          a section `model` in one file
    model-00001-of-00002.safetensors           the same section in two: each process writes the rows that it owns, and
    model-00002-of-00002.safetensors           the rows are any partition of each tensor's first dimension

Both are plain safetensors files. Their metadata says what the format itself cannot: from which row on a tensor's part
goes and how many rows there are in all, a CRC-32 of every MiB of the data (so that a reader of a few rows need not read
a whole file to know that they are sound), and which save the file belongs to. The reader is in `section_reading`.

The file is written here and not by the safetensors package in order to take tensors from wherever they are without a
second copy of them all, to compute the checksums in the same pass, and to have the system's own error when the disk is
full.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from blt_model.weights.tensor_files import DTYPES

ROWS_KEY = "blt_model.rows"
"""Metadata: JSON object, tensor name to [first row, rows of the whole tensor]; tensors not named are whole."""
CHECKSUM_KEY = "blt_model.crc32"
"""Metadata: CRC-32 of each block of each tensor, in file order, as 8 hex digits each."""
SAVE_KEY = "blt_model.save"
"""Metadata: name of the save; the files of one section share it."""
BLOCK_BYTES = 1 << 20
"""Bytes that one checksum covers, counted from each tensor's beginning in its file."""

_CRC_DIGITS = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor that one file holds."""

    name: str
    """Of the tensor."""

    tensor: Tensor
    """The rows, on any device; a tensor without dimensions is always whole."""

    first_row: int = 0
    """Where they begin in the whole tensor."""

    total_rows: int | None = None
    """Rows of the whole tensor; None where the piece is the whole."""


def section_file_name(section: str, index: int = 0, count: int = 1) -> str:
    """Return the name of one of a section's files.

    Args:
        section: such as `model`.
        index: which file, from 0.
        count: how many there are.
    """
    return f"{section}.safetensors" if count == 1 else f"{section}-{index + 1:05d}-of-{count:05d}.safetensors"


def write_section_file(path: Path, pieces: Iterable[Piece], metadata: Mapping[str, str] | None = None) -> int:
    """Write one file of a section and force it to disk.

    Equal pieces and metadata give equal files. Beyond the tensors no more memory is needed than one of them, and none
    if they are contiguous and on the CPU.

    Args:
        path: the file; its directory exists.
        pieces: each tensor at most once.
        metadata: further entries of the header.

    Returns:
        The file's size in bytes.

    Raises:
        OSError: the disk is full or not writable; the error names the file.
    """
    # The widest elements first keeps every tensor aligned, as safetensors itself does.
    ordered = sorted(pieces, key=lambda piece: (-piece.tensor.element_size(), piece.name))
    blocks = sum(-(-_size(piece) // BLOCK_BYTES) for piece in ordered)
    checksums = "0" * (_CRC_DIGITS * blocks)
    try:
        with path.open("wb", buffering=0) as file:
            header = _header(ordered, metadata or {}, checksums)
            _write_all(file, len(header).to_bytes(8, "little") + header)
            found = "".join(_write_tensor(file, piece.tensor) for piece in ordered)
            size = file.tell()
            # The checksums are as long as their place-holders, so the header only changes its content.
            file.seek(8)
            _write_all(file, _header(ordered, metadata or {}, found))
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    return size


def _size(piece: Piece) -> int:
    return piece.tensor.numel() * piece.tensor.element_size()


def _header(pieces: Sequence[Piece], metadata: Mapping[str, str], checksums: str) -> bytes:
    """Return the JSON header, padded so that the data begin at a multiple of 8 bytes."""
    rows = {piece.name: [piece.first_row, piece.total_rows] for piece in pieces if piece.total_rows is not None}
    entries = {**metadata, CHECKSUM_KEY: checksums}
    if rows:
        entries[ROWS_KEY] = json.dumps(rows, separators=(",", ":"))
    content: dict[str, object] = {"__metadata__": dict(sorted(entries.items()))}
    start = 0
    for piece in pieces:
        stop = start + _size(piece)
        content[piece.name] = {
            "dtype": _NAMES[piece.tensor.dtype],
            "shape": list(piece.tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_tensor(file: BinaryIO, tensor: Tensor) -> str:
    """Write a tensor's bytes; return its blocks' checksums."""
    flat = tensor.detach().contiguous().cpu().flatten()
    data = flat.view(torch.uint8).numpy().data
    checksums = []
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        _write_all(file, block)
        checksums.append(f"{zlib.crc32(block):0{_CRC_DIGITS}x}")
    return "".join(checksums)


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write everything: a raw file may take a part at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
