"""The packed layout, against its definition written out."""

import numpy as np
import pytest
import torch
from tests.blt_model.samples import framed_document, random_patches

from blt_model import ModelError, pack_documents
from blt_model.packed import segment_of


def test_fields_follow_their_definition() -> None:
    rng = np.random.default_rng(0)
    documents = [framed_document(rng, n) for n in (0, 1, 17, 4)]
    lengths = [random_patches(rng, len(document)) for document in documents]
    batch, targets = pack_documents(documents, lengths)
    assert batch.patch_offsets is not None
    assert batch.decoder_patch is not None
    place = patch_base = 0
    for index, (document, patches) in enumerate(zip(documents, lengths, strict=True)):
        size = len(document) - 1
        assert batch.document_offsets[index] == place
        assert batch.tokens[place : place + size].tolist() == document[:-1].tolist()
        assert targets[place : place + size].tolist() == document[1:].tolist()
        patch_of = np.repeat(np.arange(len(patches)), patches)
        for i in range(size):
            reads = batch.decoder_patch[place + i]
            assert reads == patch_base + patch_of[i + 1] - 1
            # What a position reads is complete: its last token is at or before the position.
            assert batch.patch_offsets[reads + 1] <= place + i + 1
            holder = patch_base + patch_of[i]
            assert batch.patch_offsets[holder] <= place + i < batch.patch_offsets[holder + 1]
        place += size
        patch_base += len(set(patch_of[:-1]))
    assert batch.document_offsets[-1] == batch.patch_offsets[-1] == place == len(batch.tokens)
    assert (batch.max_document_tokens, len(batch.patch_offsets) - 1) == (18, patch_base)


def test_capacities_are_filled_with_ignored_tokens_and_empty_segments() -> None:
    rng = np.random.default_rng(1)
    document = framed_document(rng, 5)
    batch, targets = pack_documents([document], [np.array([1, 3, 3])], num_tokens=10, num_documents=4, num_patches=8)
    assert batch.document_offsets.tolist() == [0, 6, 10, 10, 10]
    assert batch.patch_offsets is not None
    assert batch.decoder_patch is not None
    assert batch.patch_offsets.tolist() == [0, 1, 4, 6, 7, 10, 10, 10, 10]
    assert batch.decoder_patch.tolist() == [0, 0, 0, 1, 1, 1, 3, 3, 3, 3]
    assert batch.tokens[6:].tolist() == [0] * 4
    assert targets[6:].tolist() == [-100] * 4
    assert (batch.document_offsets.dtype, batch.tokens.dtype) == (torch.int32, torch.int64)


def test_one_token_of_padding_is_one_patch() -> None:
    document = np.array([1, 50, 2])
    batch, _ = pack_documents([document], [np.array([1, 2])], num_tokens=3, num_patches=3)
    assert batch.patch_offsets is not None
    assert batch.patch_offsets.tolist() == [0, 1, 2, 3]


def test_segment_of_skips_empty_segments() -> None:
    offsets = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    assert segment_of(offsets, 3).tolist() == [1, 1, 3]


@pytest.mark.parametrize(
    ("documents", "lengths", "capacities", "words"),
    [
        ([[1]], None, {}, "document 0 has 1 framed tokens"),
        ([[1, 9, 2]], [[1, 1]], {}, "sum to 2"),
        ([[1, 9, 2]], [[1, 2, 0]], {}, "positive"),
        ([[1, 9, 2]], [[2, 1]], {}, "must hold exactly one"),
        ([[1, 9, 2]], [], {}, "1 documents and 0 rows"),
        ([[1, 9, 2]], None, {"num_tokens": 1}, "room for 1"),
        ([[1, 9, 2]], [[1, 2]], {"num_patches": 1}, "raise num_patches"),
        ([[1, 9, 2]], [[1, 2]], {"num_tokens": 9, "num_patches": 3}, "raise num_patches"),
        ([[1, 9, 2]], None, {"num_tokens": 9, "num_documents": 1}, "raise num_documents"),
        ([], None, {}, "no document"),
    ],
)
def test_refusals(
    documents: list[list[int]], lengths: list[list[int]] | None, capacities: dict[str, int], words: str
) -> None:
    rows = None if lengths is None else [np.array(row) for row in lengths]
    with pytest.raises(ModelError, match=words):
        pack_documents([np.array(document) for document in documents], rows, **capacities)
