"""Micro batches: planned sequences as the tensors of one forward pass, straight from memory-mapped shards."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from blt_data.errors import InputError
from blt_model.packed import PackedBatch
from blt_train.documents import Int64Array
from blt_train.filling import count_segments, fill_padding, fill_sequences
from blt_train.plan import PADDING_PATCHES, Capacity, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one forward pass gets."""

    packed: PackedBatch
    """B sequences end to end: B * T tokens."""

    targets: torch.Tensor
    """int64 [B * T]: the next token of each position; `IGNORED_TARGET` for padding."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return the batch on a device; the copy is asynchronous from pinned memory."""
        return MicroBatch(
            packed=self.packed.to(device, non_blocking=True), targets=self.targets.to(device, non_blocking=True)
        )


class _Memory:
    """Gives out the memory of batches, and takes it back when the last tensor in it is gone.

    New memory would cost as much as filling it: the system hands it out page by page, and zeroed. Of pinned memory
    torch itself keeps what was freed, and gives it away only when the copies to the GPU that were started from it are
    done. Either way no batch overwrites one that somebody still holds or copies.
    """

    def __init__(self, size: int, *, pin: bool) -> None:
        self._size = size
        self._pin = pin
        self._free: deque[Int64Array] = deque()

    def take(self) -> tuple[torch.Tensor, Int64Array]:
        """Return int64 [size] that nobody else holds, as a tensor and as an array; many threads may take at once."""
        if self._pin:
            pinned = torch.empty(self._size, dtype=torch.int64, pin_memory=True)
            return pinned, pinned.numpy()
        try:
            kept = self._free.pop()
        except IndexError:
            kept = np.empty(self._size, dtype=np.int64)
        # The tensor, and whatever shares its storage, holds the view; only the finalizer holds what it is a view of.
        view = kept.view()
        weakref.finalize(view, self._free.append, kept).atexit = False
        return torch.from_numpy(view), view


class _Tensors:
    """The tensors of one batch while it is being written, all in one piece of memory, and NumPy's views of them."""

    def __init__(self, sizes: list[int], memory: _Memory) -> None:
        tensor, array = memory.take()
        self.tokens, self.targets, self.decoder_patch, self.document_offsets, self.patch_offsets = torch.split(
            tensor, sizes
        )
        ends = list(itertools.accumulate(sizes, initial=0))
        parts = [array[start:end] for start, end in itertools.pairwise(ends)]
        #: int64 [2]: most tokens and most patches of any document.
        self.longest = np.ones(2, dtype=np.int64)
        self.int64_arrays = (parts[0], parts[1], parts[2], self.longest)
        self.int32_arrays = (parts[3].view(np.int32), parts[4].view(np.int32))


def _sizes(capacity: Capacity, num_sequences: int) -> list[int]:
    """Return the sizes of a batch's tensors in units of int64: what has int32 takes half of them."""
    size = num_sequences * capacity.tokens
    return [
        size,
        size,
        size if capacity.patches else 0,
        (num_sequences * capacity.documents + 2) // 2,
        (num_sequences * capacity.patches + 2) // 2,
    ]


def _by_plan(sequences: Sequence[tuple[Plan, int]]) -> list[tuple[Plan, Int64Array]]:
    """Return each plan with int64 [n, 2] of its sequences and their slots in the batch."""
    found: dict[int, tuple[Plan, list[tuple[int, int]]]] = {}
    for slot, (plan, index) in enumerate(sequences):
        found.setdefault(id(plan), (plan, []))[1].append((index, slot))
    return [(plan, np.array(places, dtype=np.int64)) for plan, places in found.values()]


class BatchBuilder:
    """Builds packed batches of a fixed number of sequences from plans."""

    def __init__(
        self, capacity: Capacity, num_sequences: int, *, pin: bool = False, static_shapes: bool = False
    ) -> None:
        """Prepare to build.

        Args:
            capacity: of one sequence.
            num_sequences: sequences B per batch.
            pin: put the tensors into pinned memory, for asynchronous copies to CUDA.
            static_shapes: keep all capacities and bounds the same in every batch, so that a compiled model is compiled
                once; otherwise unused documents and patches are left out, which saves their computation.
        """
        self._capacity = capacity
        self._num_sequences = num_sequences
        self._is_patched = capacity.patches > 0
        self._sizes = _sizes(capacity, num_sequences)
        self._memory = _Memory(sum(self._sizes), pin=pin)
        self._static_shapes = static_shapes

    def build(self, sequences: Sequence[tuple[Plan, int]]) -> MicroBatch:
        """Build one batch; many threads may do so at the same time.

        Args:
            sequences: up to B sequences as (plan, index within it); missing ones are all padding.

        Returns:
            Tensors on the CPU; tokens and targets always of B * T positions.

        Raises:
            InputError: the patch lengths in a shard's memory are not those that were planned with.
        """
        out = _Tensors(self._sizes, self._memory)
        chosen = _by_plan(sequences)
        ends = self._ends(chosen)
        for plan, places in chosen:
            self._fill(plan, places, ends, out)
        for slot in range(len(sequences), self._num_sequences):
            self._pad(slot, ends[slot], out)
        return self._batch(out, num_documents=int(ends[-1, 0]), num_patches=int(ends[-1, 1]))

    def _ends(self, chosen: Sequence[tuple[Plan, Int64Array]]) -> Int64Array:
        """Return int64 [B + 1, 2]: documents and patches, padding's included, of all slots before each."""
        # A slot that no sequence takes is one padding document.
        counts = np.empty((self._num_sequences + 1, 2), dtype=np.int64)
        counts[:] = 1, min(PADDING_PATCHES, self._capacity.tokens)
        counts[0] = 0
        for plan, places in chosen:
            count_segments(
                places, self._capacity.tokens, plan.num_pieces, plan.sequence_tokens, plan.sequence_patches, counts
            )
        ends: Int64Array = counts.cumsum(axis=0)
        return ends

    def _fill(self, plan: Plan, places: Int64Array, ends: Int64Array, out: _Tensors) -> None:
        """Write all sequences of one plan."""
        table = plan.documents
        broken = fill_sequences(
            places,
            ends,
            self._capacity.tokens,
            (
                plan.first_piece,
                plan.num_pieces,
                plan.piece_document,
                plan.piece_start,
                plan.piece_end,
                plan.piece_patch,
                plan.piece_skip,
            ),
            (table.tokens, table.patches, table.content_address, table.patch_address),
            out.int64_arrays,
            out.int32_arrays,
        )
        if broken >= 0:
            raise InputError(
                f"{table.path}: the patch lengths of a document changed while training; restore the shards, and run "
                "blt-data verify on the directory"
            )

    def _pad(self, slot: int, first: Int64Array, out: _Tensors) -> None:
        """Make a slot all padding."""
        tokens, targets, decoder_patch, longest = out.int64_arrays
        document_offsets, patch_offsets = out.int32_arrays
        at = slot * self._capacity.tokens
        own = slice(at, at + self._capacity.tokens)
        document_offsets[first[0]] = at
        count = fill_padding(
            tokens[own], targets[own], decoder_patch[own], patch_offsets[first[1] :], at, int(first[1])
        )
        longest[:] = np.maximum(longest, [self._capacity.tokens, count])

    def _batch(self, out: _Tensors, *, num_documents: int, num_patches: int) -> MicroBatch:
        """Close the offsets and cut them to what is used, or keep all, the unused being empty segments at the end."""
        end = self._num_sequences * self._capacity.tokens
        document_offsets, patch_offsets = out.int32_arrays
        document_offsets[num_documents:] = end
        if self._is_patched:
            patch_offsets[num_patches:] = end
        longest = (int(out.longest[0]), int(out.longest[1]))
        if self._static_shapes:
            num_documents = self._num_sequences * self._capacity.documents
            num_patches = self._num_sequences * self._capacity.patches
            longest = (self._capacity.tokens, num_patches)
        packed = PackedBatch(
            tokens=out.tokens,
            document_offsets=out.document_offsets.view(torch.int32)[: num_documents + 1],
            patch_offsets=out.patch_offsets.view(torch.int32)[: num_patches + 1] if self._is_patched else None,
            decoder_patch=out.decoder_patch if self._is_patched else None,
            max_document_tokens=longest[0],
            max_document_patches=longest[1] if self._is_patched else None,
        )
        return MicroBatch(packed=packed, targets=out.targets)
