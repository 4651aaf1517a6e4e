"""Micro batches straight from memory-mapped shards.

One kernel writes a piece of a document into the arrays of a packed batch: ids, targets, patch offsets and the patch
that each position's decoder reads. A thread keeps a few micro batches ready, in pinned memory for CUDA.

Which sequences a micro batch holds follows from (step, micro batch, rank, world size) alone, and the union over ranks
and micro batches of a step does not depend on the number of ranks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numba
import numpy as np
import numpy.typing as npt
import torch

from blt_data.framing import BOE_ID, BOS_ID, BYTE_OFFSET, EOS_ID
from blt_data.shards import ShardKind
from blt_model.packed import IGNORED_TARGET, PackedBatch
from blt_train.documents import DocumentTable
from blt_train.plan import PADDING_PATCHES, Capacity, Plan
from blt_train.sequences import SequenceStream

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


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


@numba.njit(cache=True, nogil=True)
def _fill_tokens(
    content: npt.NDArray[np.uint8], start: int, end: int, tokens: Int64Array, targets: Int64Array, at: int
) -> None:
    """Write the piece framed[start:end) of a document and its targets framed[start+1:end+1) from position `at`."""
    # Framed token i is byte i - 1; the ends are taken apart so that the loops are plain copies.
    first_byte = max(start, 1)
    if start == 0:
        tokens[at] = BOS_ID
    for position in range(first_byte, end):
        tokens[at + position - start] = content[position - 1] + BYTE_OFFSET
    last_byte = min(end, content.size)
    for position in range(start, last_byte):
        targets[at + position - start] = content[position] + BYTE_OFFSET
    if last_byte < end:
        targets[at + last_byte - start] = EOS_ID


@numba.njit(cache=True, nogil=True)
def _fill_patches(
    lengths: npt.NDArray[np.uint16],
    skip: int,
    piece: tuple[int, int],
    patch_offsets: Int32Array,
    decoder_patch: Int64Array,
    at: int,
    next_patch: int,
) -> int:
    """Write a piece's patch starts and decoder patches; return the number of its patches.

    Args:
        lengths: uint16: patch lengths of the shard from the piece's first patch on.
        skip: tokens of that patch that earlier pieces took.
        piece: its first input token and its end in the framed document.
        patch_offsets: int32: start of each patch of the batch; written from `next_patch`.
        decoder_patch: int64: written from `at`.
        at: position of the piece's first token in the batch.
        next_patch: index of the piece's first patch in the batch.
    """
    size = piece[1] - piece[0]
    patch_offsets[next_patch] = at
    decoder_patch[at] = next_patch
    # Inside a document the first patch is split, its first token being a patch of its own; then its rest comes next.
    has_rest = piece[0] > 0 and int(lengths[0]) - skip > 1
    column = -1 if has_rest else 0
    latest = next_patch
    position = 1
    while position < size:
        # Invariant: a patch starts at `position`.
        latest += 1
        patch_offsets[latest] = at + position
        column += 1
        length = int(lengths[column])
        if column == 0:
            length -= skip + 1
        boundary = position + length
        last = min(boundary, size)
        for index in range(position, last):
            decoder_patch[at + index] = latest - 1
        position = last
        if boundary <= size:
            # The token after the patch starts a patch, in this piece or as the target beyond its end.
            decoder_patch[at + boundary - 1] = latest
    return latest - next_patch + 1


class _Arrays:
    """The arrays of one batch while it is being written, sequence by sequence, piece by piece."""

    def __init__(self, capacity: Capacity, num_sequences: int) -> None:
        size = num_sequences * capacity.tokens
        num_patches = num_sequences * capacity.patches
        self.tokens = np.full(size, BOE_ID, dtype=np.int64)
        self.targets = np.full(size, IGNORED_TARGET, dtype=np.int64)
        self.document_offsets = np.full(num_sequences * capacity.documents + 1, size, dtype=np.int32)
        self.patch_offsets = np.full(num_patches + 1, size, dtype=np.int32)
        self.decoder_patch = np.zeros(size if num_patches else 0, dtype=np.int64)
        self.next_document = 0
        self.next_patch = 0
        self.longest_in_tokens = 1
        self.longest_in_patches = 1

    def begin(self, at: int, num_tokens: int) -> None:
        """Count a document (or piece) of some tokens that begins at a position."""
        self.document_offsets[self.next_document] = at
        self.next_document += 1
        self.longest_in_tokens = max(self.longest_in_tokens, num_tokens)

    def add_patches(self, count: int) -> None:
        """Count the patches that the latest document has been given."""
        self.next_patch += count
        self.longest_in_patches = max(self.longest_in_patches, count)

    def pad(self, at: int, num_tokens: int) -> None:
        """Make the positions from `at` a pseudo-document without targets, in patches of one token and the rest."""
        self.begin(at, num_tokens)
        if self.decoder_patch.size:
            count = min(PADDING_PATCHES, num_tokens)
            self.patch_offsets[self.next_patch : self.next_patch + count] = (at, at + 1)[:count]
            self.decoder_patch[at : at + num_tokens] = self.next_patch
            self.add_patches(count)


class BatchBuilder:
    """Builds packed batches of a fixed number of sequences from plans."""

    def __init__(
        self,
        documents: DocumentTable,
        capacity: Capacity,
        num_sequences: int,
        *,
        pin: bool = False,
        static_shapes: bool = False,
    ) -> None:
        """Prepare to build.

        Args:
            documents: what the plans refer to.
            capacity: of one sequence.
            num_sequences: sequences B per batch.
            pin: put the tensors into pinned memory, for asynchronous copies to CUDA.
            static_shapes: keep all capacities and bounds the same in every batch, so that a compiled model is compiled
                once; otherwise unused documents and patches are left out, which saves their computation.
        """
        self._documents = documents
        self._capacity = capacity
        self._num_sequences = num_sequences
        self._is_patched = documents.kind is ShardKind.PATCHED
        self._pin = pin
        self._static_shapes = static_shapes

    def build(self, sequences: Sequence[tuple[Plan, int]]) -> MicroBatch:
        """Build one batch.

        Args:
            sequences: up to B sequences as (plan, index within it); missing ones are all padding.

        Returns:
            Tensors on the CPU; tokens and targets always of B * T positions.
        """
        arrays = _Arrays(self._capacity, self._num_sequences)
        for slot in range(self._num_sequences):
            at, end = slot * self._capacity.tokens, (slot + 1) * self._capacity.tokens
            if slot < len(sequences):
                plan, index = sequences[slot]
                first = int(plan.first_piece[index])
                for piece in range(first, first + int(plan.num_pieces[index])):
                    self._fill(arrays, plan, piece, at)
                    at += int(plan.piece_end[piece] - plan.piece_start[piece])
            if at < end:
                arrays.pad(at, end - at)
        return self._as_tensors(arrays)

    def _fill(self, arrays: _Arrays, plan: Plan, piece: int, at: int) -> None:
        """Write one piece from a position on."""
        table = self._documents
        document = int(plan.piece_document[piece])
        start, end = int(plan.piece_start[piece]), int(plan.piece_end[piece])
        shard, first_byte = int(table.shard[document]), int(table.content_start[document])
        content = table.contents[shard][first_byte : first_byte + int(table.tokens[document]) - 1]
        arrays.begin(at, end - start)
        _fill_tokens(content, start, end, arrays.tokens, arrays.targets, at)
        if self._is_patched:
            lengths = table.patch_lengths[shard][int(table.patch_start[document]) + int(plan.piece_patch[piece]) :]
            skip = int(plan.piece_skip[piece])
            into = (arrays.patch_offsets, arrays.decoder_patch)
            arrays.add_patches(int(_fill_patches(lengths, skip, (start, end), *into, at, arrays.next_patch)))

    def _as_tensors(self, arrays: _Arrays) -> MicroBatch:
        """Wrap the arrays as tensors, pinned if asked."""

        def tensor(array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
            wrapped = torch.from_numpy(array)
            return wrapped.pin_memory() if self._pin else wrapped

        document_offsets, patch_offsets = arrays.document_offsets, arrays.patch_offsets
        longest = (self._capacity.tokens, patch_offsets.size - 1)
        if not self._static_shapes:
            document_offsets = document_offsets[: arrays.next_document + 1]
            patch_offsets = patch_offsets[: arrays.next_patch + 1]
            longest = (arrays.longest_in_tokens, arrays.longest_in_patches)
        packed = PackedBatch(
            tokens=tensor(arrays.tokens),
            document_offsets=tensor(document_offsets),
            patch_offsets=tensor(patch_offsets) if self._is_patched else None,
            decoder_patch=tensor(arrays.decoder_patch) if self._is_patched else None,
            max_document_tokens=longest[0],
            max_document_patches=longest[1] if self._is_patched else None,
        )
        return MicroBatch(packed=packed, targets=tensor(arrays.targets))


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Which part of each global batch a rank reads, in which portions."""

    sequences_per_step: int
    """Sequences in a global batch."""

    sequences_per_micro_batch: int
    """Sequences in one micro batch of one rank."""

    rank: int = 0
    """This rank."""

    world_size: int = 1
    """Number of ranks."""

    @property
    def micro_batches(self) -> int:
        """Micro batches per step and rank; the config has checked that it is a whole number."""
        return self.sequences_per_step // (self.sequences_per_micro_batch * self.world_size)

    def sequences(self, step: int, micro_batch: int) -> range:
        """Return the stream's sequences of one micro batch of a step; steps and micro batches count from 0."""
        portion = micro_batch * self.world_size + self.rank
        first = step * self.sequences_per_step + portion * self.sequences_per_micro_batch
        return range(first, first + self.sequences_per_micro_batch)


class Loader:
    """This rank's micro batches of steps [first_step, end_step), made ahead by a thread.

    A context manager: leaving it ends the thread. The thread's errors are raised where the batches are read.
    """

    def __init__(
        self,
        stream: SequenceStream,
        part: Slice,
        *,
        first_step: int,
        end_step: int,
        prefetch: int = 4,
        pin: bool = False,
        static_shapes: bool = False,
    ) -> None:
        """Prepare the loader; the thread starts on entering the context.

        Args:
            stream: the sequences of training.
            part: which of them this rank reads.
            first_step: step to begin with, from 0: all the state there is.
            end_step: step to end before.
            prefetch: micro batches to keep ready.
            pin: make pinned tensors.
            static_shapes: see `BatchBuilder`.
        """
        self._stream = stream
        self._part = part
        self._steps = range(first_step, end_step)
        self._builder = BatchBuilder(
            stream.documents, stream.capacity, part.sequences_per_micro_batch, pin=pin, static_shapes=static_shapes
        )
        self._queue: queue.Queue[MicroBatch | BaseException] = queue.Queue(maxsize=prefetch)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def batch(self, step: int, micro_batch: int) -> MicroBatch:
        """Build one micro batch here and now, whatever the thread does."""
        located = [self._stream.locate(index) for index in self._part.sequences(step, micro_batch)]
        return self._builder.build([(self._stream.plan(epoch), index) for epoch, index in located])

    def __iter__(self) -> Iterator[MicroBatch]:
        for _ in range(len(self._steps) * self._part.micro_batches):
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _work(self) -> None:
        try:
            for step in self._steps:
                for micro_batch in range(self._part.micro_batches):
                    if not self._put(self.batch(step, micro_batch)):
                        return
        except Exception as error:  # whatever it is belongs to the reader
            self._put(error)

    def _put(self, item: MicroBatch | BaseException) -> bool:
        """Put an item where the reader finds it; False once the loader is being left."""
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
