"""The packed ragged batch: documents end to end, and what says where documents and patches begin.

There is no padded [documents, length] rectangle. A batch has fixed capacities where its maker wants static shapes:
offsets that repeat the number of tokens are empty documents or patches.

Legend: T tokens, D documents, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt_model.errors import ModelError
from blt_model.vocabulary import BOE_ID

IGNORED_TARGET = -100
"""Target of a position that has nothing to predict."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Documents end to end, as model input. ByteLM reads the first two fields only."""

    tokens: Tensor
    """int64 [T]: input token ids of all documents."""
    document_offsets: Tensor
    """int32 [D + 1]: document d holds tokens document_offsets[d] to document_offsets[d + 1]; the last equals T."""
    patch_offsets: Tensor | None = None
    """int32 [P + 1]: patch p holds tokens patch_offsets[p] to patch_offsets[p + 1]; the last equals T."""
    decoder_patch: Tensor | None = None
    """int64 [T], never decreasing: the patch whose latent vectors position i reads, which is the patch before the one
    that holds token i + 1 of the framed document."""
    max_document_tokens: int | None = None
    """Upper bound of a document's tokens; None means T. Only speed depends on it."""
    max_document_patches: int | None = None
    """Upper bound of a document's patches, and of the empty patches at the end; None means P. Only speed depends on
    it."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device.

        Args:
            device: where to.
            non_blocking: let copies from pinned memory overlap with work on the device.
        """

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return PackedBatch(
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            document_offsets=self.document_offsets.to(device, non_blocking=non_blocking),
            patch_offsets=move(self.patch_offsets),
            decoder_patch=move(self.decoder_patch),
            max_document_tokens=self.max_document_tokens,
            max_document_patches=self.max_document_patches,
        )


def segment_of(offsets: Tensor, length: int) -> Tensor:
    """The segment (document or patch) that holds each of `length` positions.

    Args:
        offsets: int32 or int64 [S + 1], never decreasing, from 0 to length.
        length: number of positions.

    Returns:
        int64 [length]; empty segments hold nothing.
    """
    positions = torch.arange(length, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, positions, right=True) - 1


@dataclass(frozen=True, slots=True)
class _Piece:
    """One document as arrays: its inputs, its targets, its input patch lengths and what each position reads."""

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    patch_lengths: npt.NDArray[np.int64] | None
    decoder_patch: npt.NDArray[np.int64] | None


def _piece(index: int, framed: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer] | None) -> _Piece:
    tokens = np.asarray(framed, dtype=np.int64)
    if len(tokens) < 2:
        raise ModelError(f"document {index} has {len(tokens)} framed tokens; it needs BOS and EOS at least.")
    if lengths is None:
        return _Piece(tokens[:-1], tokens[1:], None, None)
    covered = np.asarray(lengths, dtype=np.int64)
    if covered.sum() != len(tokens) or (covered < 1).any():
        raise ModelError(
            f"document {index} has {len(tokens)} framed tokens, and its patch lengths sum to {covered.sum()}; every "
            "length must be positive and the sum equal the tokens."
        )
    if covered[0] != 1:
        raise ModelError(f"the first patch of document {index} holds {covered[0]} tokens; it must hold exactly one.")
    decoder_patch = np.repeat(np.arange(len(covered)), covered)[1:] - 1
    over_inputs = covered.copy()
    over_inputs[-1] -= 1
    return _Piece(tokens[:-1], tokens[1:], over_inputs[over_inputs > 0], decoder_patch)


def _padding(num_tokens: int, patched: bool, spare_patches: int) -> _Piece:
    """A pseudo-document of boundary tokens whose targets are ignored, in as few patches as the rules allow."""
    lengths = np.array([1, num_tokens - 1] if num_tokens > 1 else [1], dtype=np.int64)
    if patched and spare_patches < len(lengths):
        raise ModelError(
            f"{num_tokens} padding tokens need {len(lengths)} patches and {spare_patches} are left; raise num_patches."
        )
    return _Piece(
        np.full(num_tokens, BOE_ID, dtype=np.int64),
        np.full(num_tokens, IGNORED_TARGET, dtype=np.int64),
        lengths if patched else None,
        np.zeros(num_tokens, dtype=np.int64) if patched else None,
    )


def _offsets(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int | None, what: str) -> Tensor:
    """int32 offsets of segments, filled up to a capacity with empty ones."""
    count = len(lengths)
    if capacity is not None and count > capacity:
        raise ModelError(f"the batch holds {count} {what} and has room for {capacity}; raise num_{what}.")
    room = count if capacity is None else capacity
    offsets = np.zeros(room + 1, dtype=np.int64)
    offsets[1 : count + 1] = np.cumsum(lengths)
    offsets[count + 1 :] = offsets[count]
    return torch.from_numpy(offsets.astype(np.int32))


def pack_documents(
    documents: Sequence[npt.NDArray[np.integer]],
    patch_lengths: Sequence[npt.NDArray[np.integer]] | None = None,
    *,
    num_tokens: int | None = None,
    num_documents: int | None = None,
    num_patches: int | None = None,
) -> tuple[PackedBatch, Tensor]:
    """Pack framed documents (or pieces of them) into one batch and the targets of its positions.

    Args:
        documents: framed token ids, each of at least two tokens; input is all but the last, targets all but the first.
        patch_lengths: for each document the patch lengths over its framed tokens, the first of them 1.
        num_tokens: capacity in input tokens; a pseudo-document of ignored tokens fills what is left.
        num_documents: capacity in documents, the pseudo-document included.
        num_patches: capacity in patches.

    Returns:
        The batch, and int64 [T] targets (-100 where there is nothing to predict), both on the CPU.

    Raises:
        ModelError: a document too short, patch lengths that do not fit, or a capacity too small.
    """
    if patch_lengths is not None and len(patch_lengths) != len(documents):
        raise ModelError(f"there are {len(documents)} documents and {len(patch_lengths)} rows of patch lengths.")
    pieces = [
        _piece(index, framed, None if patch_lengths is None else patch_lengths[index])
        for index, framed in enumerate(documents)
    ]
    total = sum(len(piece.tokens) for piece in pieces)
    if num_tokens is not None and total > num_tokens:
        raise ModelError(f"the documents hold {total} input tokens and there is room for {num_tokens}.")
    used = sum(len(piece.patch_lengths) for piece in pieces if piece.patch_lengths is not None)
    if num_tokens is not None and total < num_tokens:
        spare = num_tokens - total if num_patches is None else num_patches - used
        pieces.append(_padding(num_tokens - total, patch_lengths is not None, spare))
    if not pieces:
        raise ModelError("there is no document to pack; give one, or num_tokens.")
    return _join(pieces, num_documents, num_patches)


def _join(pieces: Sequence[_Piece], num_documents: int | None, num_patches: int | None) -> tuple[PackedBatch, Tensor]:
    sizes = [len(piece.tokens) for piece in pieces]
    patch_offsets = decoder_patch = max_patches = None
    lengths = [piece.patch_lengths for piece in pieces if piece.patch_lengths is not None]
    reads = [piece.decoder_patch for piece in pieces if piece.decoder_patch is not None]
    if lengths:
        counts = [len(row) for row in lengths]
        bases = np.cumsum([0, *counts[:-1]])
        patch_offsets = _offsets(np.concatenate(lengths), num_patches, "patches")
        decoder_patch = torch.from_numpy(np.concatenate([base + row for base, row in zip(bases, reads, strict=True)]))
        max_patches = max(*counts, len(patch_offsets) - 1 - sum(counts), 1)
    batch = PackedBatch(
        tokens=torch.from_numpy(np.concatenate([piece.tokens for piece in pieces])),
        document_offsets=_offsets(sizes, num_documents, "documents"),
        patch_offsets=patch_offsets,
        decoder_patch=decoder_patch,
        max_document_tokens=max(sizes),
        max_document_patches=max_patches,
    )
    return batch, torch.from_numpy(np.concatenate([piece.targets for piece in pieces]))
