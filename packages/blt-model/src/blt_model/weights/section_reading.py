"""Reading a section of tensors from one safetensors file or from several that each hold some rows of every tensor.

A reader takes any rows of any tensor, and reads no others from disk, whatever number of processes wrote the files: so a
checkpoint of 8 processes is resumed by 2 or 32, each of which needs memory for its own rows alone. Rows are read with
ordinary reads into the memory where they are to stay; mapped pages would count as the process's own. The headers of all
files are read first, and must together hold every row of every tensor exactly once. How files are written:
`section_writing`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from blt_model.errors import ModelError
from blt_model.weights.section_writing import BLOCK_BYTES, CHECKSUM_KEY, ROWS_KEY, SAVE_KEY, section_file_name
from blt_model.weights.tensor_files import Place, TensorInfo, fill_from, read_header

MEND = "copy the directory again, or name another checkpoint"
"""How every error of this module ends, but for the full stop."""
_CRC_DIGITS = 8


@dataclass(frozen=True, slots=True)
class _Rows:
    """Consecutive rows of a tensor, in one file."""

    place: Place
    first: int
    stop: int
    total: int
    checksums: tuple[int, ...] | None
    """Of each block; None where the file's writer left none."""


def section_files(directory: Path, section: str) -> list[Path]:
    """Return the files of a section, whether it is in one or several.

    Args:
        directory: where they lie.
        section: such as `model`.

    Raises:
        ModelError: one is missing, or the directory holds several sets.
    """
    whole = directory / section_file_name(section)
    form = re.compile(re.escape(section) + r"-([0-9]{5,})-of-([0-9]{5,})\.safetensors")
    found = [match for path in directory.glob(f"{section}-*.safetensors") if (match := form.fullmatch(path.name))]
    if whole.is_file() or not found:
        return [whole]
    counts = {int(match[2]) for match in found}
    if len(counts) > 1:
        sets = " and ".join(f"of {count}" for count in sorted(counts))
        raise ModelError(f"{directory} holds {section} files {sets}: they are of different checkpoints; {MEND}.")
    count = counts.pop()
    paths = [directory / section_file_name(section, index, count) for index in range(count)]
    for path in paths:
        if not path.is_file():
            raise ModelError(f"{path} is missing; {MEND}.")
    return paths


class SectionReader:
    """The tensors of one section: whole ones or rows of them, checked against their checksums."""

    def __init__(self, directory: Path, section: str) -> None:
        """Read the headers and check that they make whole tensors.

        Args:
            directory: where the files lie.
            section: such as `model`.

        Raises:
            ModelError: a file is missing or damaged, rows are in no file or in two, or the files do not belong
                together.
        """
        self.directory = directory
        self.metadata: dict[str, str] = {}
        self._rows: dict[str, list[_Rows]] = {}
        paths = section_files(directory, section)
        for path in paths:
            self._add(path, is_first=path == paths[0])
        for name, rows in self._rows.items():
            rows.sort(key=lambda part: (part.first, part.stop))
            _check_rows(name, rows, section)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(_whole_shape(rows[0]), rows[0].place.info.dtype) for name, rows in self._rows.items()
        }

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor's beginning."""
        return self._rows[name][0].place.path

    def read(self, name: str, destination: Tensor) -> None:
        """Fill a whole tensor.

        Args:
            name: one of `tensors`.
            destination: contiguous, of the stored shape; dtype and device are converted to.

        Raises:
            ModelError: the data are not those that were written.
        """
        self.read_rows(name, 0, destination)

    def read_rows(self, name: str, first_row: int, destination: Tensor) -> None:
        """Fill a tensor with some rows of a stored one.

        Args:
            name: one of `tensors`.
            first_row: of the stored tensor.
            destination: contiguous, of as many rows as are wanted; dtype and device are converted to.

        Raises:
            ModelError: the data are not those that were written.
        """
        target = destination.detach()
        target = target if target.ndim else target.view(1)
        stop_row = first_row + target.shape[0]
        for part in self._rows[name]:
            begin, end = max(first_row, part.first), min(stop_row, part.stop)
            if begin < end:
                wanted = target[begin - first_row : end - first_row].view(-1)
                _read_part(name, part, begin - part.first, end - part.first, wanted)

    def _add(self, path: Path, *, is_first: bool) -> None:
        """Take a file's tensors in."""
        places, metadata = read_header(path)
        try:
            for name, rows in _rows_of_file(path, places, metadata).items():
                self._rows.setdefault(name, []).append(rows)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(f"{path} is damaged ({error}); {MEND}.") from None
        own = {key: value for key, value in metadata.items() if key not in (ROWS_KEY, CHECKSUM_KEY)}
        if not is_first and own != self.metadata:
            saves = [entries.get(SAVE_KEY, "an unnamed save") for entries in (self.metadata, own)]
            reason = f"{saves[1]}, not of {saves[0]}" if saves[0] != saves[1] else "a model of another configuration"
            raise ModelError(f"{path} is of {reason} like the files before it; {MEND}.")
        self.metadata = own


def _rows_of_file(path: Path, places: Mapping[str, Place], metadata: Mapping[str, str]) -> dict[str, _Rows]:
    """Return what a file holds of each tensor.

    Raises:
        ValueError, TypeError or KeyError: its metadata do not fit its tensors.
    """
    bounds = json.loads(metadata.get(ROWS_KEY, "{}"))
    text = metadata.get(CHECKSUM_KEY)
    end = max((place.start + _bytes(place) for place in places.values()), default=None)
    if text is not None and end is not None and path.stat().st_size != end:
        raise ValueError("it is longer than its header says")
    result, used = {}, 0
    # File order is the checksums' order; names tell empty tensors apart, which have no blocks.
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        length = place.info.shape[0] if place.info.shape else 1
        first, total = bounds.get(name, (0, length))
        if not (type(first) is int and type(total) is int and 0 <= first <= first + length <= total):
            raise ValueError(f"it holds {length} rows of {name} from {first} on, of {total}")
        count = -(-_bytes(place) // BLOCK_BYTES)
        checksums = None
        if text is not None:
            digits = text[used * _CRC_DIGITS : (used + count) * _CRC_DIGITS]
            if len(digits) != count * _CRC_DIGITS:
                raise ValueError("checksums are missing")
            checksums = tuple(int(digits[at : at + _CRC_DIGITS], 16) for at in range(0, len(digits), _CRC_DIGITS))
        used += count
        result[name] = _Rows(place, first, first + length, total, checksums)
    return result


def _bytes(place: Place) -> int:
    return place.info.dtype.itemsize * torch.Size(place.info.shape).numel()


def _whole_shape(rows: _Rows) -> tuple[int, ...]:
    shape = rows.place.info.shape
    return (rows.total, *shape[1:]) if shape else shape


def _check_rows(name: str, rows: Sequence[_Rows], section: str) -> None:
    """Refuse a tensor whose parts disagree, leave a gap, or overlap."""
    first, done = rows[0], 0
    for index, part in enumerate(rows):
        if (_whole_shape(part), part.place.info.dtype) != (_whole_shape(first), first.place.info.dtype):
            raise ModelError(
                f"{part.place.path} and {first.place.path} hold parts of {name} that do not fit each other; {MEND}."
            )
        if part.first > done:
            raise ModelError(_gap(name, done, part.first, part, section))
        if part.first < done:
            before = rows[index - 1].place.path
            raise ModelError(f"{part.place.path} and {before} both hold row {part.first} of {name}; {MEND}.")
        done = part.stop
    if done < first.total:
        raise ModelError(_gap(name, done, first.total, first, section))


def _gap(name: str, first: int, stop: int, rows: _Rows, section: str) -> str:
    files = rows.place.path.parent / f"{section}-*.safetensors"
    return f"{files} hold all rows of {name} but those from {first} to {stop - 1}; {MEND}."


def _read_part(name: str, rows: _Rows, begin: int, end: int, target: Tensor) -> None:
    """Read some of a file's rows, block by block.

    Args:
        name: of the tensor, for messages.
        rows: what the file holds of it.
        begin: first row wanted, counted from the file's first.
        end: behind the last.
        target: [elements] where they go.
    """
    size, item = _bytes(rows.place), rows.place.info.dtype.itemsize
    row_bytes = size // (rows.stop - rows.first)
    start, stop = begin * row_bytes, end * row_bytes
    is_direct = target.device.type == "cpu" and target.dtype == rows.place.info.dtype
    with rows.place.path.open("rb", buffering=0) as file:
        for index in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            block = range(index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, size))
            used = range(max(block.start, start), min(block.stop, stop))
            part = target[(used.start - start) // item : (used.stop - start) // item]
            if is_direct and used == block:
                _read_block(file, name, rows, index, part)
                continue
            # Rows that are wanted in part, or elsewhere: the checksum needs the whole block all the same.
            whole = torch.empty(len(block) // item, dtype=rows.place.info.dtype)
            _read_block(file, name, rows, index, whole)
            part.copy_(whole[(used.start - block.start) // item : (used.stop - block.start) // item])


def _read_block(file: BinaryIO, name: str, rows: _Rows, index: int, target: Tensor) -> None:
    """Fill a tensor with one block and check it."""
    file.seek(rows.place.start + index * BLOCK_BYTES)
    fill_from(file, target, rows.place.path)
    if rows.checksums is not None and zlib.crc32(target.view(torch.uint8).numpy().data) != rows.checksums[index]:
        raise ModelError(
            f"{rows.place.path} is damaged: what it holds of {name} does not have the checksum of what was written; "
            f"{MEND}."
        )
