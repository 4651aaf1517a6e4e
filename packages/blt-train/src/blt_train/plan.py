"""The packing plan: which pieces of which documents make up each sequence of an epoch.

A plan is a pure function of (documents, capacities, seed, epoch). Documents are shuffled over the whole data set and
packed greedily: each sequence is filled to its capacity of tokens, patches and documents, and a document that does
not fit goes on in the next sequence, at a patch boundary (anywhere for byte shards). A single patch longer than a
sequence is split. The sequences themselves are shuffled too, so that a very long document is spread over the epoch.
Every framed token but BOS is a target exactly once.

A corpus whose index does not fit into memory is planned group by group (see `groups`): each group of shards then has a
plan like that of a whole epoch.

A piece is the input tokens framed[start:end) of one document, with targets framed[start+1:end+1). The first patch of
a piece always holds one token: for a piece that begins inside a document its first patch is split (1, rest).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numba
import numpy as np
import numpy.typing as npt

from blt_data.shards import ShardKind
from blt_train.addresses import lengths_at
from blt_train.config import MIN_SEQUENCE_DOCUMENTS, MIN_SEQUENCE_PATCHES
from blt_train.documents import DocumentTable, Int64Array
from blt_train.shuffling import permutation

#: Patches that the padding at a sequence's end may need: its first token and the rest.
PADDING_PATCHES = 2
#: Utilisation that a derived capacity of patches or documents must reach on a sample.
TARGET_UTILISATION = 0.97
#: A gain in utilisation that is worth twice as many documents per sequence.
_NOTABLE_UTILISATION = 0.002
#: Documents of the sample on which capacities are derived.
_SAMPLE_DOCUMENTS = 20_000
#: Derived patch capacities are multiples of this.
_PATCH_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What one sequence can hold, padding included."""

    tokens: int
    """Input tokens T."""

    patches: int
    """Patches P; 0 for byte shards."""

    documents: int
    """Documents or pieces D, the padding's pseudo-document among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The sequences of one epoch, or of one group of shards in it, in the order in which they are read."""

    documents: DocumentTable
    """What the pieces are pieces of."""

    piece_document: Int64Array
    """int64 [N]: document of each piece."""

    piece_start: Int64Array
    """int64 [N]: first input token of the piece in its framed document."""

    piece_end: Int64Array
    """int64 [N]: end (exclusive) of the piece's input tokens."""

    piece_patch: Int64Array
    """int64 [N]: the document's patch in which the piece begins."""

    piece_skip: Int64Array
    """int64 [N]: tokens of that patch that earlier pieces took; above 0 only where a huge patch was split."""

    first_piece: Int64Array
    """int64 [S]: first piece of each sequence; a sequence's pieces are neighbours."""

    num_pieces: Int64Array
    """int64 [S]: pieces of each sequence."""

    sequence_tokens: Int64Array
    """int64 [S]: real (unpadded) input tokens, equally many targets."""

    sequence_patches: Int64Array
    """int64 [S]: real patches; zeros for byte shards."""

    sequence_bytes: Int64Array
    """int64 [S]: targets that are bytes, that is all but the EOS."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences S."""
        return self.first_piece.size

    def utilisation(self, capacity: Capacity) -> float:
        """Real tokens divided by the capacity of all sequences."""
        return float(self.sequence_tokens.sum()) / (self.num_sequences * capacity.tokens)


@numba.njit(cache=True, nogil=True)
def _grown(array: Int64Array) -> Int64Array:
    """Return a copy with twice the rows."""
    result = np.empty((2 * array.shape[0], array.shape[1]), dtype=array.dtype)
    result[: array.shape[0]] = array
    return result


@numba.njit(cache=True, nogil=True)
def _take_patches(
    lengths: npt.NDArray[np.uint16], patch: int, skip: int, start: int, total: int, room: tuple[int, int], limit: int
) -> tuple[int, int, int, int]:
    """Return what of a document fits: (tokens, patches, next patch, tokens taken of that next patch).

    Args:
        lengths: uint16: the document's patch lengths.
        patch: patch in which the piece begins.
        skip: tokens of that patch already taken.
        start: the piece's first input token.
        total: input tokens of the document.
        room: free tokens and free patches of the sequence.
        limit: tokens of an empty sequence; only patches longer than that are split.
    """
    first = min(int(lengths[patch]) - skip, total - start)
    left = lengths.size - patch + (1 if start > 0 and first > 1 else 0)
    if total - start <= room[0] and left <= room[1]:
        # All of it: its patches need not be looked at one by one.
        return total - start, left, lengths.size, 0
    tokens, patches = 0, 0
    while start + tokens < total:
        rest = min(int(lengths[patch]) - skip, total - start - tokens)
        is_split = start > 0 and tokens == 0
        taken = min(rest, room[0] - tokens) if rest > limit else rest
        cost = 2 if is_split and taken > 1 else 1
        if taken == 0 or tokens + taken > room[0] or patches + cost > room[1]:
            break
        tokens += taken
        patches += cost
        if taken < rest:
            return tokens, patches, patch, skip + taken
        patch += 1
        skip = 0
    return tokens, patches, patch, skip


@numba.njit(cache=True, nogil=True)
def _pack(
    order: Int64Array,
    doc_tokens: Int64Array,
    doc_patches: Int64Array,
    doc_patch_address: Int64Array,
    capacity: tuple[int, int, int],
    keep_whole: bool,
) -> tuple[Int64Array, Int64Array]:
    """Return pieces int64 [N, 5] and sequences int64 [S, 5], the columns as in `Plan`.

    `capacity` is what real pieces may use: tokens, patches (0: not patched), documents.
    """
    limit, max_patches, max_documents = capacity
    pieces = np.empty((order.size + 16, 5), dtype=np.int64)
    sequences = np.empty((order.size // 4 + 16, 5), dtype=np.int64)
    num_pieces, num_sequences = 0, 0
    first, tokens, patches, content = 0, 0, 0, 0
    for document in order:
        total = doc_tokens[document]
        start, patch, skip = 0, 0, 0
        while start < total:
            room = (limit - tokens, max_patches - patches)
            taken, taken_patches = 0, 0
            next_patch, next_skip = patch, skip
            whole = start == 0 and total <= room[0] and doc_patches[document] <= room[1]
            if num_pieces - first == max_documents or (keep_whole and start == 0 and not whole and tokens > 0):
                taken = 0
            elif whole:
                taken, taken_patches = total, doc_patches[document]
            elif max_patches == 0:
                taken = min(total - start, room[0])
            else:
                taken, taken_patches, next_patch, next_skip = _take_patches(
                    lengths_at(doc_patch_address[document], doc_patches[document]),
                    patch, skip, start, total, room, limit,
                )  # fmt: skip
            if taken == 0:
                if num_sequences == sequences.shape[0]:
                    sequences = _grown(sequences)
                sequences[num_sequences] = (first, num_pieces - first, tokens, patches, content)
                num_sequences += 1
                first, tokens, patches, content = num_pieces, 0, 0, 0
                continue
            if num_pieces == pieces.shape[0]:
                pieces = _grown(pieces)
            pieces[num_pieces] = (document, start, start + taken, patch, skip)
            num_pieces += 1
            start += taken
            patch, skip = next_patch, next_skip
            tokens += taken
            patches += taken_patches
            content += taken - (1 if start == total else 0)
    if num_sequences == sequences.shape[0]:
        sequences = _grown(sequences)
    sequences[num_sequences] = (first, num_pieces - first, tokens, patches, content)
    return pieces[:num_pieces].copy(), sequences[: num_sequences + 1].copy()


def pack(documents: DocumentTable, order: Int64Array, capacity: Capacity, *, keep_whole: bool = False) -> Plan:
    """Pack documents in a given order into sequences, in that order.

    Args:
        documents: the data set's documents.
        order: int64 [n], n >= 1: the documents to pack.
        capacity: of each sequence.
        keep_whole: cut only documents that do not fit an empty sequence, and let those begin a sequence: each
            document's pieces are then the same whatever its neighbours, as evaluation wants it.

    Returns:
        The plan, its sequences in packing order.
    """
    usable = (capacity.tokens, max(0, capacity.patches - PADDING_PATCHES), capacity.documents - 1)
    pieces, sequences = _pack(order, documents.tokens, documents.patches, documents.patch_address, usable, keep_whole)
    document, start, end, patch, skip = (np.ascontiguousarray(column) for column in pieces.T)
    first, count, tokens, patches, content = (np.ascontiguousarray(column) for column in sequences.T)
    return Plan(
        documents=documents,
        piece_document=document,
        piece_start=start,
        piece_end=end,
        piece_patch=patch,
        piece_skip=skip,
        first_piece=first,
        num_pieces=count,
        sequence_tokens=tokens,
        sequence_patches=patches,
        sequence_bytes=content,
    )


def plan_epoch(
    documents: DocumentTable, capacity: Capacity, *, seed: int, epoch: int, group: int | None = None
) -> Plan:
    """Return the shuffled plan of one epoch of training, or of one group of documents in it.

    Args:
        documents: the data set's documents, or the group's.
        capacity: of each sequence.
        seed: of the order, 0 to 2**63 - 1.
        epoch: which pass over the data, from 0.
        group: which group of the epoch; None where the documents are all there are.
    """
    key = () if group is None else (group,)
    plan = pack(documents, permutation(documents.num_documents, seed, epoch, 0, *key), capacity)
    order = permutation(plan.num_sequences, seed, epoch, 1, *key)
    return replace(
        plan,
        first_piece=plan.first_piece[order],
        num_pieces=plan.num_pieces[order],
        sequence_tokens=plan.sequence_tokens[order],
        sequence_patches=plan.sequence_patches[order],
        sequence_bytes=plan.sequence_bytes[order],
    )


def derive_capacity(
    documents: DocumentTable,
    *,
    tokens: int,
    patches: int | None = None,
    max_documents: int | None = None,
    seed: int = 0,
) -> Capacity:
    """Fill in the capacities that a config leaves open, so that the sequences of a sample are 97% full if they can be.

    Documents: twice as many as fit on average, and some room; doubled where many short documents among few long ones
    leave sequences empty. Patches: the smallest multiple of 8, from the mean patch length upwards in steps of a
    twentieth, that suffices.

    Args:
        documents: the data set's documents.
        tokens: tokens per sequence.
        patches: patches per sequence, if given.
        max_documents: documents per sequence, if given.
        seed: chooses the sample.
    """
    is_patched = documents.kind is ShardKind.PATCHED
    sample = permutation(documents.num_documents, seed, 0, 0)[:_SAMPLE_DOCUMENTS]
    largest = Capacity(tokens=tokens, patches=tokens + PADDING_PATCHES if is_patched else 0, documents=tokens + 1)
    if max_documents is None:
        max_documents = _enough_documents(documents, sample, largest)
    max_documents = max(max_documents, MIN_SEQUENCE_DOCUMENTS)
    if not is_patched or patches is not None:
        return Capacity(tokens=tokens, patches=patches or 0, documents=max_documents)
    for twentieths in range(21, 200):
        wanted = int(tokens / documents.mean_patch_length * twentieths / 20) + MIN_SEQUENCE_PATCHES
        rounded = -(-wanted // _PATCH_MULTIPLE) * _PATCH_MULTIPLE
        capacity = Capacity(tokens=tokens, patches=min(rounded, largest.patches), documents=max_documents)
        if capacity.patches == largest.patches or _fullness(documents, sample, capacity) >= TARGET_UTILISATION:
            return capacity
    return replace(largest, documents=max_documents)


def _enough_documents(documents: DocumentTable, sample: Int64Array, largest: Capacity) -> int:
    """Return how many documents per sequence are enough, judged by a sample."""
    mean = documents.num_targets / documents.num_documents
    enough = min(largest.documents, int(2 * largest.tokens / mean) + 16)
    fullness = _fullness(documents, sample, replace(largest, documents=enough))
    while fullness < TARGET_UTILISATION and enough < largest.documents:
        more = min(largest.documents, 2 * enough)
        fuller = _fullness(documents, sample, replace(largest, documents=more))
        if fuller < fullness + _NOTABLE_UTILISATION:
            # Something else limits the sequences, such as patches nearly as long as they are.
            break
        enough, fullness = more, fuller
    return enough


def _fullness(documents: DocumentTable, sample: Int64Array, capacity: Capacity) -> float:
    """Return the utilisation of all sequences of a sample but the last, which ends with the sample."""
    plan = pack(documents, sample, capacity)
    return float(plan.sequence_tokens[:-1].mean()) / capacity.tokens if plan.num_sequences > 1 else 1.0
