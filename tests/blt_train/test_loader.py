"""Batches: equal to a slow reference, the same for every world size, and every target once."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_train.samples import table_of, text_documents, write_documents, write_patched

from blt_data import frame
from blt_model import PackedBatch, pack_documents
from blt_model.packed import IGNORED_TARGET
from blt_train.documents import DocumentTable
from blt_train.loader import BatchBuilder, Loader, MicroBatch, Slice
from blt_train.plan import Capacity, Plan, derive_capacity, plan_epoch
from blt_train.sequences import SequenceStream


def in_shard_order(rows: list[bytes]) -> list[bytes]:
    return rows[0::2] + rows[1::2]


def piece_patches(lengths: npt.NDArray[np.uint16], start: int, end: int) -> npt.NDArray[np.int64]:
    """Patch lengths of framed[start : end + 1], found token by token."""
    boundaries = {0, *np.cumsum(lengths)}
    starts = [token for token in range(start, end + 1) if token in boundaries or token in (start, start + 1)]
    return np.diff([*starts, end + 1])


def reference_batch(
    plan: Plan, sequence: int, contents: list[bytes], lengths: list[npt.NDArray[np.uint16]] | None, capacity: Capacity
) -> tuple[PackedBatch, torch.Tensor]:
    """One sequence by way of blt_model's own packing, piece by piece."""
    first = int(plan.first_piece[sequence])
    framed, patches = [], []
    for piece in range(first, first + int(plan.num_pieces[sequence])):
        document = int(plan.piece_document[piece])
        start, end = int(plan.piece_start[piece]), int(plan.piece_end[piece])
        framed.append(frame(contents[document])[start : end + 1])
        if lengths is not None:
            patches.append(piece_patches(lengths[document], start, end))
    return pack_documents(
        framed,
        patches if lengths is not None else None,
        num_tokens=capacity.tokens,
        num_documents=capacity.documents,
        num_patches=capacity.patches if lengths is not None else None,
    )


def assert_same(batch: MicroBatch, packed: PackedBatch, targets: torch.Tensor) -> None:
    assert torch.equal(batch.targets, targets)
    for name in ("tokens", "document_offsets", "patch_offsets", "decoder_patch"):
        got, expected = getattr(batch.packed, name), getattr(packed, name)
        if expected is None:
            assert got is None
        else:
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), name


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=10), min_size=1, max_size=8),
    st.booleans(),
    st.integers(2, 20),
    st.integers(4, 12),
)
def test_equals_packing_piece_by_piece(rows: list[list[int]], patched: bool, tokens: int, patches: int) -> None:
    lengths = [np.array([1, *row], dtype=np.uint16) for row in rows]
    generator = np.random.default_rng(0)
    contents = [generator.integers(0, 256, int(row.sum()) - 2, dtype=np.uint8).tobytes() for row in lengths]
    with tempfile.TemporaryDirectory() as folder:
        table = table_of(write_documents(Path(folder), contents, lengths if patched else None))
    capacity = Capacity(tokens=tokens, patches=patches if patched else 0, documents=4)
    plan = plan_epoch(table, capacity, seed=0, epoch=0)
    builder = BatchBuilder(capacity, 1, static_shapes=True)
    ordered = lengths[0::2] + lengths[1::2] if patched else None
    for sequence in range(plan.num_sequences):
        batch = builder.build([(plan, sequence)])
        assert_same(batch, *reference_batch(plan, sequence, in_shard_order(contents), ordered, capacity))
        assert int((batch.targets != IGNORED_TARGET).sum()) == plan.sequence_tokens[sequence]
        if batch.packed.patch_offsets is not None:
            real = batch.packed.patch_offsets[: int(plan.sequence_patches[sequence]) + 1]
            assert (real.diff() > 0).all()


@pytest.fixture
def patched(tmp_path: Path) -> DocumentTable:
    return table_of(write_patched(tmp_path / "patched", text_documents(50)))


def test_batch_of_sequences_is_the_sequences_end_to_end(patched: DocumentTable) -> None:
    capacity = derive_capacity(patched, tokens=96)
    plan = plan_epoch(patched, capacity, seed=0, epoch=0)
    single = BatchBuilder(capacity, 1)
    parts = [single.build([(plan, index)]) for index in range(3)]
    batch = BatchBuilder(capacity, 3).build([(plan, index) for index in range(3)])
    assert torch.equal(batch.packed.tokens, torch.cat([part.packed.tokens for part in parts]))
    assert torch.equal(batch.targets, torch.cat([part.targets for part in parts]))
    starts: list[int] = []
    decoder: list[int] = []
    num_patches = 0
    for index, part in enumerate(parts):
        assert part.packed.patch_offsets is not None
        assert part.packed.decoder_patch is not None
        starts += (part.packed.patch_offsets[:-1] + index * 96).tolist()
        decoder += (part.packed.decoder_patch + num_patches).tolist()
        num_patches += len(part.packed.patch_offsets) - 1
    assert batch.packed.patch_offsets is not None
    assert batch.packed.decoder_patch is not None
    assert batch.packed.patch_offsets.tolist() == [*starts, 3 * 96]
    assert batch.packed.decoder_patch.tolist() == decoder


def test_static_shapes_differ_in_empty_segments_only(patched: DocumentTable) -> None:
    capacity = derive_capacity(patched, tokens=96)
    plan = plan_epoch(patched, capacity, seed=0, epoch=0)
    sequences = [(plan, index) for index in range(3)]
    static = BatchBuilder(capacity, 4, static_shapes=True).build(sequences).packed
    trimmed = BatchBuilder(capacity, 4).build(sequences).packed
    assert static.patch_offsets is not None
    assert trimmed.patch_offsets is not None
    assert static.patch_offsets.numel() == 4 * capacity.patches + 1
    assert static.document_offsets.numel() == 4 * capacity.documents + 1
    for full, short in (
        (static.patch_offsets, trimmed.patch_offsets),
        (static.document_offsets, trimmed.document_offsets),
    ):
        assert torch.equal(full[: short.numel()], short)
        assert (full[short.numel() :] == 4 * 96).all()
    # The fourth sequence is missing, so it is one padding document.
    assert trimmed.document_offsets[-2] == 3 * 96


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batch_is_the_same_for_every_world_size(patched: DocumentTable, world_size: int) -> None:
    stream = SequenceStream(patched, derive_capacity(patched, tokens=96), seed=0)

    def rows(size: int, per_micro_batch: int, step: int) -> Counter[bytes]:
        found: Counter[bytes] = Counter()
        for rank in range(size):
            part = Slice(sequences_per_step=8, sequences_per_micro_batch=per_micro_batch, rank=rank, world_size=size)
            loader = Loader(stream, part, first_step=0, end_step=4)
            for micro_batch in range(part.micro_batches):
                batch = loader.batch(step, micro_batch)
                pairs = torch.stack([batch.packed.tokens, batch.targets]).view(2, -1, 96)
                found.update(pairs[:, index].numpy().tobytes() for index in range(pairs.shape[1]))
        return found

    for step in range(4):
        alone = rows(1, 8, step)
        assert alone.total() == 8
        assert rows(world_size, 2, step) == alone


def test_epochs_of_targets_without_loss(tmp_path: Path) -> None:
    documents = [bytes([65 + index]) * (index * 7 % 50) for index in range(26)]
    table = table_of(write_documents(tmp_path / "d", documents))
    stream = SequenceStream(table, Capacity(tokens=32, patches=0, documents=8), seed=0)
    sequences = stream.plan(0).num_sequences + stream.plan(1).num_sequences
    part = Slice(sequences_per_step=1, sequences_per_micro_batch=1)
    counts: Counter[int] = Counter()
    with Loader(stream, part, first_step=0, end_step=sequences) as loader:
        for batch in loader:
            counts.update(batch.targets.tolist())
    counts.pop(IGNORED_TARGET)
    expected = Counter(token for content in documents for token in frame(content)[1:].tolist())
    assert counts == {token: 2 * count for token, count in expected.items()}


def test_thread_gives_what_was_asked_for_in_order(patched: DocumentTable) -> None:
    stream = SequenceStream(patched, derive_capacity(patched, tokens=96), seed=0)
    part = Slice(sequences_per_step=4, sequences_per_micro_batch=2)
    with Loader(stream, part, first_step=3, end_step=6, prefetch=1) as loader:
        got = list(loader)
        expected = [loader.batch(step, micro_batch) for step in range(3, 6) for micro_batch in range(2)]
    assert len(got) == len(expected)
    for batch, wanted in zip(got, expected, strict=True):
        assert_same(batch, wanted.packed, wanted.targets)


def test_errors_of_the_thread_reach_the_reader(patched: DocumentTable) -> None:
    class Broken(SequenceStream):
        def locate(self, index: int) -> tuple[int, int]:
            if index >= 4:
                raise OSError("the disk went away")
            return super().locate(index)

    stream = Broken(patched, derive_capacity(patched, tokens=96), seed=0)
    part = Slice(sequences_per_step=2, sequences_per_micro_batch=2)
    with (
        Loader(stream, part, first_step=0, end_step=9) as loader,
        pytest.raises(OSError, match="the disk went away"),
    ):
        list(loader)
