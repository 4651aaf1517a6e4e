"""The kernel that writes planned sequences into the arrays of a packed batch, without Python and without its lock.

One call fills all sequences of one plan in a batch. Where each sequence's documents and patches begin in the batch is
known from the plan beforehand, so the sequences of different plans can be written one after the other.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from blt_data.framing import BOE_ID, BOS_ID, BYTE_OFFSET, EOS_ID
from blt_model.packed import IGNORED_TARGET
from blt_train.addresses import bytes_at, lengths_at
from blt_train.documents import Int32Array, Int64Array
from blt_train.plan import PADDING_PATCHES


@numba.njit(cache=True, nogil=True)
def _fill_tokens(content: npt.NDArray[np.uint8], start: int, end: int, tokens: Int64Array, targets: Int64Array) -> None:
    """Write the piece framed[start:end) of a document and its targets framed[start+1:end+1).

    Args:
        content: uint8: the document's bytes.
        start: first input token of the piece.
        end: end (exclusive) of its input tokens.
        tokens: int64 [end - start]: written.
        targets: int64 [end - start]: written.
    """
    # Framed token i is byte i - 1; the ends are taken apart so that the loops are plain copies.
    if start == 0:
        tokens[0] = BOS_ID
        inputs, into = content[: end - 1], tokens[1:]
    else:
        inputs, into = content[start - 1 : end - 1], tokens
    for index in range(inputs.size):
        into[index] = np.int64(inputs[index]) + BYTE_OFFSET
    outputs = content[start : min(end, content.size)]
    for index in range(outputs.size):
        targets[index] = np.int64(outputs[index]) + BYTE_OFFSET
    if outputs.size < end - start:
        targets[end - start - 1] = EOS_ID


@numba.njit(cache=True, nogil=True)
def _fill_patches(
    lengths: npt.NDArray[np.uint16],
    skip: int,
    start: int,
    decoder_patch: Int64Array,
    patch_offsets: Int32Array,
    at: int,
    first_patch: int,
) -> int:
    """Write a piece's patch starts and decoder patches; return the number of its patches, -1 if they do not fit.

    Args:
        lengths: uint16: the document's patch lengths from the piece's first patch on.
        skip: tokens of that patch that earlier pieces took.
        start: the piece's first input token in the framed document.
        decoder_patch: int64, one per token of the piece: written.
        patch_offsets: int32: start of each patch from the piece's first on, as far as there is room: written.
        at: position of the piece's first token in the batch.
        first_patch: index of the piece's first patch in the batch.
    """
    size = decoder_patch.size
    if patch_offsets.size == 0 or lengths.size == 0:
        return -1
    # Position i reads the patch before the one that holds token i + 1. So first a 1 wherever token i + 1 starts a patch
    # (in the piece or as the target beyond its end), then running sums: twice as fast as writing patch by patch, whose
    # lengths no processor can predict.
    decoder_patch[:] = 0
    decoder_patch[0] = 1
    patch_offsets[0] = at
    count, position = 1, 1
    # The piece's first token is a patch of its own; inside a document the rest of the split patch comes next.
    rest = int(lengths[0]) - skip - 1
    for column in range(lengths.size):
        # Invariant: a patch starts at `position`.
        length = int(lengths[column]) if column > 0 else rest
        if length == 0:
            continue
        if position >= size:
            break
        if count >= patch_offsets.size:
            return -1
        patch_offsets[count] = at + position
        count += 1
        position += length
        if position <= size:
            decoder_patch[position - 1] = 1
    if position < size:
        return -1
    latest = first_patch - 1
    for index in range(size):
        latest += decoder_patch[index]
        decoder_patch[index] = latest
    return count


@numba.njit(cache=True, nogil=True)
def fill_padding(
    tokens: Int64Array,
    targets: Int64Array,
    decoder_patch: Int64Array,
    patch_offsets: Int32Array,
    at: int,
    first_patch: int,
) -> int:
    """Write a pseudo-document without targets, in patches of one token and the rest; return the number of these.

    Args:
        tokens: int64 [n], n >= 1: written.
        targets: int64 [n]: written.
        decoder_patch: int64 [n], or empty where there are no patches: written.
        patch_offsets: int32: start of each patch from the padding's first on: written.
        at: position of the padding in the batch.
        first_patch: index of its first patch in the batch.
    """
    tokens[:] = BOE_ID
    targets[:] = IGNORED_TARGET
    if decoder_patch.size == 0:
        return 0
    decoder_patch[:] = first_patch
    count = min(PADDING_PATCHES, tokens.size)
    for index in range(count):
        patch_offsets[index] = at + index
    return count


@numba.njit(cache=True, nogil=True)
def count_segments(
    places: Int64Array,
    num_tokens: int,
    num_pieces: Int64Array,
    sequence_tokens: Int64Array,
    sequence_patches: Int64Array,
    counts: Int64Array,
) -> None:
    """Count the documents and patches, padding's included, of sequences of a plan.

    Args:
        places: int64 [n, 2]: for each sequence its index in the plan and its slot in the batch.
        num_tokens: tokens T of each slot.
        num_pieces: as in `Plan`, like the two that follow.
        sequence_tokens: as in `Plan`.
        sequence_patches: as in `Plan`.
        counts: int64 [slots + 1, 2]: row slot + 1 is written for each sequence.
    """
    for sequence, slot in places:
        padding = num_tokens - sequence_tokens[sequence]
        counts[slot + 1, 0] = num_pieces[sequence] + min(1, padding)
        counts[slot + 1, 1] = sequence_patches[sequence] + min(PADDING_PATCHES, padding)


@numba.njit(cache=True, nogil=True)
def fill_sequences(
    places: Int64Array,
    ends: Int64Array,
    num_tokens: int,
    plan: tuple[Int64Array, Int64Array, Int64Array, Int64Array, Int64Array, Int64Array, Int64Array],
    table: tuple[Int64Array, Int64Array, Int64Array, Int64Array],
    int64_out: tuple[Int64Array, Int64Array, Int64Array, Int64Array],
    int32_out: tuple[Int32Array, Int32Array],
) -> int:
    """Write whole sequences of a plan; return -1, or the document whose patch lengths are not what was planned with.

    Args:
        places: int64 [n, 2]: for each sequence its index in the plan and its slot in the batch.
        ends: int64 [slots + 1, 2]: documents and patches of all slots before each.
        num_tokens: tokens T of each slot.
        plan: of `Plan`: first_piece, num_pieces, piece_document, piece_start, piece_end, piece_patch, piece_skip.
        table: of `DocumentTable`: tokens, patches, content_address, patch_address.
        int64_out: tokens, targets and decoder patches [slots * T] (no decoder patches where there are no patches), of
            which the sequences' slots are written; and [2], raised to the most tokens and patches of a document.
        int32_out: starts of the batch's documents and patches, of which those of the sequences are written.
    """
    first_piece, num_pieces, piece_document, piece_start, piece_end, piece_patch, piece_skip = plan
    doc_tokens, doc_patches, content_address, patch_address = table
    tokens, targets, decoder_patch, longest = int64_out
    document_offsets, patch_offsets = int32_out
    is_patched = decoder_patch.size > 0
    for sequence, slot in places:
        at, end = slot * num_tokens, (slot + 1) * num_tokens
        next_document, next_patch, end_patch = ends[slot, 0], ends[slot, 1], ends[slot + 1, 1]
        for piece in range(first_piece[sequence], first_piece[sequence] + num_pieces[sequence]):
            document, start = piece_document[piece], piece_start[piece]
            size = piece_end[piece] - start
            own = slice(at, at + size)
            content = bytes_at(content_address[document], doc_tokens[document] - 1)
            _fill_tokens(content, start, start + size, tokens[own], targets[own])
            if is_patched:
                lengths = lengths_at(patch_address[document], doc_patches[document])[piece_patch[piece] :]
                room = patch_offsets[next_patch:end_patch]
                count = _fill_patches(lengths, piece_skip[piece], start, decoder_patch[own], room, at, next_patch)
                if count < 0:
                    return int(document)
                next_patch += count
                longest[1] = max(longest[1], count)
            document_offsets[next_document] = at
            next_document += 1
            longest[0] = max(longest[0], size)
            at += size
        if at < end:
            document_offsets[next_document] = at
            own, room = slice(at, end), patch_offsets[next_patch:end_patch]
            count = fill_padding(tokens[own], targets[own], decoder_patch[own], room, at, next_patch)
            longest[0] = max(longest[0], end - at)
            longest[1] = max(longest[1], count)
    return -1
