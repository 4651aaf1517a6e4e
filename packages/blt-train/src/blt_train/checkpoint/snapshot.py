"""A copy of tensors in CPU memory, from which a checkpoint is written while training goes on.

The memory is one block, made for the first copy and used again for every later one. Where tensors come from a GPU it is
page-locked, so that the copy runs at the bus's full speed; by `cudaHostRegister`, since torch's own allocator of locked
memory rounds up to a power of two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blt_model.weights.section_writing import Piece

#: Every tensor begins at a multiple of this, a cache line.
_ALIGNMENT = 64


class SnapshotMemory:
    """CPU memory for copies of tensors, one set at a time."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._memory: Tensor | None = None
        self._is_locked = False

    def take(self, sections: Mapping[str, Sequence[Piece]]) -> dict[str, list[Piece]]:
        """Copy tensors; what was copied before is overwritten.

        Args:
            sections: pieces by section, all on one device or the CPU.

        Returns:
            The same pieces with tensors in CPU memory; the copies are complete.
        """
        tensors = [piece.tensor for pieces in sections.values() for piece in pieces]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        self._reserve(sum(map(_room, tensors)), lock=on_gpu)
        copied: dict[str, list[Piece]] = {}
        start = 0
        for name, pieces in sections.items():
            copied[name] = []
            for piece in pieces:
                target = self._part(start, piece.tensor)
                target.copy_(piece.tensor, non_blocking=self._is_locked)
                copied[name].append(dataclasses.replace(piece, tensor=target))
                start += _room(piece.tensor)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copied

    def release(self) -> None:
        """Give the memory back."""
        if self._memory is not None and self._is_locked:
            _cuda_runtime().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._is_locked = None, False

    def _reserve(self, size: int, *, lock: bool) -> None:
        """Have at least so many bytes."""
        if self._memory is not None and self._memory.numel() >= size and self._is_locked >= lock:
            return
        self.release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if lock and size:
            # Where the system allows no locking the copy is slower, and that is all.
            self._is_locked = int(_cuda_runtime().cudaHostRegister(self._memory.data_ptr(), size, 0)) == 0

    def _part(self, start: int, like: Tensor) -> Tensor:
        """Return memory of a tensor's shape and dtype."""
        if self._memory is None:
            raise RuntimeError("memory is reserved before it is used")
        return self._memory[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _room(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes with what is left free behind it."""
    return math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT) * _ALIGNMENT
