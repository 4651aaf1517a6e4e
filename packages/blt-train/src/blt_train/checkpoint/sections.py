"""Sections of a checkpoint: which rows of each tensor this process writes, and filling tensors with stored rows.

A section is a mapping of names to tensors, plain ones that every process holds whole, or DTensors of which it holds
rows. What several processes hold (plain tensors, replicas of a shard) is written by all of them together, each an equal
part of the rows, so that no byte is written twice and none waits for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blt_model import ModelError
from blt_model.weights.native import WEIGHTS_SECTION
from blt_model.weights.section_reading import MEND, SectionReader
from blt_model.weights.section_writing import Piece
from blt_train.checkpoint.directory import resume_another
from blt_train.errors import CheckpointError


class Section(StrEnum):
    """The sections that a checkpoint may have; each is named like its files."""

    MODEL = WEIGHTS_SECTION
    """Weights by parameter name."""
    OPTIMIZER = "optimizer"
    """`<moment>.<parameter name>`."""
    EMA = "ema"
    """Averaged weights by parameter name."""


@dataclass(frozen=True, slots=True)
class HeldRows:
    """What this process holds of a tensor."""

    local: Tensor
    """The rows, sharing the tensor's memory."""
    first: int
    """Where they begin in the whole tensor."""
    copy: int
    """Which of the processes that hold the same rows this one is."""
    copies: int
    """How many those are."""


def held_rows(tensor: Tensor, *, rank: int = 0, world_size: int = 1) -> HeldRows:
    """Return what this process holds of a tensor.

    `torch.distributed.tensor` takes seconds to import, and one process has no use for it, so that sharded tensors are
    told by what they can do.

    Args:
        tensor: plain, which every process holds whole, or a DTensor, replicated or sharded by rows over each axis of
            its mesh.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: it is sharded otherwise.
    """
    if not hasattr(tensor, "to_local"):
        return HeldRows(tensor.detach(), 0, rank, world_size)
    sharded: Any = tensor
    mesh, coordinate = sharded.device_mesh, sharded.device_mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this process is not in the tensor's mesh")
    first, stop, copy, copies = 0, tensor.shape[0] if tensor.ndim else 1, 0, 1
    for axis, placement in enumerate(sharded.placements):
        if placement.is_replicate():
            copy, copies = copy * mesh.size(axis) + coordinate[axis], copies * mesh.size(axis)
        elif placement.is_shard(0):
            # Sharding cuts as torch.chunk does.
            most = -(-(stop - first) // mesh.size(axis))
            first, stop = min(first + most * coordinate[axis], stop), min(first + most * (coordinate[axis] + 1), stop)
        else:
            raise ValueError(f"a tensor is placed as {placement}, which a checkpoint cannot hold")
    with torch.no_grad():
        local: Tensor = sharded.to_local().detach()
    if (local.shape[0] if local.ndim else 1) != stop - first:
        raise ValueError(f"a tensor of {tensor.shape} placed as {sharded.placements} has {local.shape} here")
    return HeldRows(local, first, copy, copies)


def owned_pieces(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> list[Piece]:
    """Return what this process writes of a section; over all processes that is every row once.

    Args:
        tensors: the section.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: a tensor is sharded otherwise than by rows.
    """
    if world_size == 1:
        return [Piece(name, tensor.detach()) for name, tensor in tensors.items()]
    pieces = []
    for name, tensor in tensors.items():
        held = held_rows(tensor, rank=rank, world_size=world_size)
        if held.local.ndim == 0:
            if held.copy == 0:
                pieces.append(Piece(name, held.local))
            continue
        count, total = held.local.shape[0], tensor.shape[0]
        begin, end = count * held.copy // held.copies, count * (held.copy + 1) // held.copies
        if begin < end or total == 0:
            pieces.append(Piece(name, held.local[begin:end], held.first + begin, total))
    return pieces


def load_section(checkpoint: Path, section: Section, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors with a section, whatever number of processes wrote it; each process reads the rows that it holds.

    Args:
        checkpoint: its directory.
        section: which.
        tensors: plain or DTensors, of the section's names and shapes.

    Raises:
        CheckpointError: a file is missing or damaged, or the section is of other tensors.
    """
    reader = open_section(checkpoint, section)
    _check_names(checkpoint, section, tensors, reader.tensors)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != reader.tensors[name].shape:
            raise CheckpointError(
                f"{reader.path_of(name)}: holds {name} with the shape {list(reader.tensors[name].shape)}, where "
                f"{list(tensor.shape)} is needed; {resume_another(checkpoint)}"
            )
        fill_tensor(reader, name, tensor)


def open_section(checkpoint: Path, section: Section) -> SectionReader:
    """Open a section.

    Args:
        checkpoint: its directory.
        section: which.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        return SectionReader(checkpoint, section)
    except ModelError as error:
        raise _unreadable(checkpoint, error) from error


def fill_tensor(reader: SectionReader, name: str, tensor: Tensor) -> None:
    """Fill a tensor with this process's rows of a stored one of the same shape.

    Args:
        reader: of the section.
        name: in the section.
        tensor: plain or a DTensor.

    Raises:
        CheckpointError: the file is damaged.
    """
    held = held_rows(tensor)
    try:
        reader.read_rows(name, held.first, held.local)
    except ModelError as error:
        raise _unreadable(reader.directory, error) from error


def _unreadable(checkpoint: Path, error: ModelError) -> CheckpointError:
    """Return the error that tells of a file that is missing or damaged, and how to go on."""
    reason = str(error).removesuffix(".").removesuffix(f"; {MEND}")
    return CheckpointError(f"the checkpoint cannot be resumed: {reason}; {resume_another(checkpoint)}")


def _check_names(checkpoint: Path, section: Section, needed: Iterable[str], stored: Iterable[str]) -> None:
    missing, extra = sorted({*needed} - {*stored}), sorted({*stored} - {*needed})
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"also holds {extra[0]}"
        raise CheckpointError(
            f"{checkpoint}: its section {section} {what}, so it is of another model; {resume_another(checkpoint)}"
        )
