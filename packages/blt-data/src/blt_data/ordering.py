"""Where a document goes: its key and its place in source order, pure functions of the document and the options.

The key is a 64-bit number. Its top bits name the *cell* that the document falls into; consecutive cells make a shard.
A job orders its documents by (key, source order):

- shuffled: the key is BLAKE2b of (seed, source, file, row, id), so that the order is a permutation drawn by the seed;
- shuffled and without duplicates: the key is BLAKE2b of (seed, content), so that equal contents meet, whatever file
  they come from, and all but the first in source order can be dropped;
- in source order: the key is (unit ordinal, number of the segment within the unit), which grows with source order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from blt_data.documents import DocumentBatch
from blt_data.errors import InputError

#: Documents of few bytes or none must not pile up in one shard or in memory.
MAX_DOCUMENTS: Final = 1_000_000

#: Cells that a shard is made of, on average: a shard then falls short of its size by about 1/32 at most.
CELLS_PER_SHARD: Final = 16

#: More cells than this make the tables of a job large; a cell that is larger than a shard is cut by documents.
_MAX_CELL_BITS: Final = 20

#: A place in source order is a file's (or unit's) ordinal above this many bits, and a row (or a segment) below.
_ROW_BITS: Final = 40

_SHUFFLE: Final = b"blt.shuffle.1"
_CONTENT: Final = b"blt.content.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ordering:
    """How a job orders its documents."""

    seed: int | None
    """Of the shuffle; None keeps source order."""
    deduplicate: bool
    """Whether of documents of equal content only the first is kept; needs a seed."""
    cell_bits: int
    """Bits of the key that name the cell, in a shuffled job."""
    segment_bytes: int
    """Content bytes per cell, in a job that keeps source order."""

    @classmethod
    def of(cls, *, seed: int | None, deduplicate: bool, shard_bytes: int, expected_bytes: int) -> Ordering:
        """Return the ordering of a job.

        Args:
            seed: of the shuffle, or None.
            deduplicate: whether equal contents are dropped.
            shard_bytes: content bytes per shard.
            expected_bytes: content bytes of the whole job, as planned before reading; only the cells' size depends on
                how good a guess it is.

        Raises:
            InputError: duplicates cannot be dropped in source order, or the seed is out of range.
        """
        if deduplicate and seed is None:
            raise InputError(
                "duplicates are found where equal contents meet, which source order does not make them do; "
                "drop --no-shuffle or --deduplicate"
            )
        if seed is not None and not 0 <= seed < 2**64:
            raise InputError(f"the shuffle seed must be 0 to {2**64 - 1}, not {seed}")
        cells = -(-expected_bytes * CELLS_PER_SHARD // shard_bytes)
        return cls(
            seed=seed,
            deduplicate=deduplicate,
            cell_bits=min(_MAX_CELL_BITS, max(0, cells - 1).bit_length()),
            segment_bytes=max(1, shard_bytes // CELLS_PER_SHARD),
        )

    @property
    def cell_shift(self) -> int:
        """Bits below the cell in a key (64: there is one cell)."""
        return 0 if self.seed is None else 64 - self.cell_bits

    def cells(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Return the cell of each key.

        Args:
            keys: uint64 [n].

        Returns:
            uint64 [n].
        """
        if self.cell_shift == 64:
            return np.zeros_like(keys)
        return keys >> np.uint64(self.cell_shift)


def places(ordinal: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return the place of documents in source order.

    Args:
        ordinal: of the file among all files of the job, below 2**24.
        rows: int64 [n]: rows within the file, below 2**40.

    Returns:
        uint64 [n].
    """
    return rows.astype(np.uint64) + np.uint64(ordinal << _ROW_BITS)


def shuffle_keys(batch: DocumentBatch, seed: int) -> npt.NDArray[np.uint64]:
    """Return keys that put documents into the order of the seed.

    Args:
        batch: n documents.
        seed: of the shuffle.

    Returns:
        uint64 [n].
    """
    prefix = hashlib.blake2b(digest_size=8, person=_SHUFFLE)
    prefix.update(f"{seed}\0{batch.source}\0{batch.file}\0".encode())
    digests = []
    for row, document_id in zip(batch.rows.tolist(), batch.document_ids.to_pylist(), strict=True):
        digest = prefix.copy()
        digest.update(f"{row}\0{document_id}".encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), "<u8")


def content_keys(batch: DocumentBatch, seed: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return keys that are equal for equal contents, and 64 more bits of the digest to make sure of it.

    Args:
        batch: n documents.
        seed: of the shuffle.

    Returns:
        Two of uint64 [n].
    """
    offsets, data = batch.offsets.tolist(), batch.data.data
    prefix = hashlib.blake2b(digest_size=16, key=str(seed).encode(), person=_CONTENT)
    digests = []
    for start, end in pairwise(offsets):
        digest = prefix.copy()
        digest.update(data[start:end])
        digests.append(digest.digest())
    both = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()


class Segments:
    """Numbers the segments of a unit: the keys of a job in source order.

    Args:
        segment_bytes: content bytes at which a segment ends.
    """

    _MOST_DOCUMENTS: Final = MAX_DOCUMENTS // CELLS_PER_SHARD

    def __init__(self, segment_bytes: int) -> None:
        self._segment_bytes = segment_bytes
        self._unit = -1
        self._bytes = self._documents = 0

    def keys(self, unit: int, batch: DocumentBatch) -> npt.NDArray[np.uint64]:
        """Return the keys of a unit's next documents.

        Args:
            unit: the unit's ordinal in the job, never smaller than in the last call.
            batch: n documents.

        Returns:
            uint64 [n], growing.
        """
        if unit != self._unit:
            self._unit, self._bytes, self._documents = unit, 0, 0
        # A document belongs to the segment in which it begins.
        starts = batch.offsets[:-1] - batch.offsets[0] + self._bytes
        numbers = np.arange(self._documents, self._documents + len(batch))
        self._bytes += batch.content_bytes
        self._documents += len(batch)
        # Whichever of the two limits is reached: their sum grows by one at least where either does.
        segments = starts // self._segment_bytes + numbers // self._MOST_DOCUMENTS
        return places(unit, segments)
