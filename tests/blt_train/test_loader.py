"""Batches: equal to a slow reference, the same for every world size, and every target once."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_train.samples import (
    sequence_rows,
    stream_of,
    table_of,
    text_documents,
    write_documents,
    write_patched,
)

from blt_data import InputError, frame
from blt_model import PackedBatch, pack_documents
from blt_model.packed import IGNORED_TARGET
from blt_train.batches import BatchBuilder, MicroBatch
from blt_train.documents import DocumentTable
from blt_train.loader import Loader, Slice
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


def test_a_batch_of_several_plans_is_the_sequences_end_to_end(tmp_path: Path) -> None:
    tables = [table_of(write_patched(tmp_path / str(seed), text_documents(30, seed=seed))) for seed in range(2)]
    capacity = derive_capacity(tables[0], tokens=96)
    plans = [plan_epoch(table, capacity, seed=0, epoch=0) for table in tables]
    chosen = [(plans[0], 4), (plans[1], 4), (plans[1], 0), (plans[0], 1)]
    batch = BatchBuilder(capacity, 4).build(chosen)
    single = BatchBuilder(capacity, 1)
    alone = [single.build([item]) for item in chosen]
    assert torch.equal(batch.packed.tokens, torch.cat([part.packed.tokens for part in alone]))
    assert torch.equal(batch.targets, torch.cat([part.targets for part in alone]))
    assert sequence_rows(batch, 96) == [row for part in alone for row in sequence_rows(part, 96)]


def test_patch_lengths_that_are_not_those_of_the_plan_are_refused(tmp_path: Path) -> None:
    # As when a shard's file is overwritten while it is mapped: the kernel must not write beyond its arrays.
    contents = [b"some words in a row"] * 2
    short, long = (np.array([1, *row], dtype=np.uint16) for row in ([10, 10], [2] * 10))
    planned = table_of(write_documents(tmp_path / "planned", contents, [short, short]))
    found = table_of(write_documents(tmp_path / "found", contents, [long, long]))
    capacity = Capacity(tokens=64, patches=12, documents=4)
    plan = plan_epoch(planned, capacity, seed=0, epoch=0)
    changed = dataclasses.replace(planned, patch_address=found.patch_address, columns=found.columns)
    with pytest.raises(InputError, match="planned: the patch lengths of a document changed"):
        BatchBuilder(capacity, 1).build([(dataclasses.replace(plan, documents=changed), 0)])


def test_epochs_of_targets_without_loss(tmp_path: Path) -> None:
    documents = [bytes([65 + index]) * (index * 7 % 50) for index in range(26)]
    stream = stream_of(write_documents(tmp_path / "d", documents), Capacity(tokens=32, patches=0, documents=8))
    sequences = 0
    while stream.figures(sequences, 1).epoch < 2:
        sequences += 1
    part = Slice(sequences_per_step=1, sequences_per_micro_batch=1)
    counts: Counter[int] = Counter()
    with Loader(stream, part, first_step=0, end_step=sequences + 1) as loader:
        for batch in loader:
            counts.update(batch.targets.tolist())
    counts.pop(IGNORED_TARGET)
    expected = Counter(token for content in documents for token in frame(content)[1:].tolist())
    assert counts == {token: 2 * count for token, count in expected.items()}


@pytest.fixture
def stream(tmp_path: Path) -> SequenceStream:
    directory = write_patched(tmp_path / "stream", text_documents(50))
    return stream_of(directory, derive_capacity(table_of(directory), tokens=96))


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 4), (1, 1), (3, 2), (2, 8)])
def test_threads_give_what_was_asked_for_in_order(stream: SequenceStream, workers: int, prefetch: int) -> None:
    part = Slice(sequences_per_step=4, sequences_per_micro_batch=2)
    with Loader(stream, part, first_step=3, end_step=6, workers=workers, prefetch=prefetch) as loader:
        got = list(loader)
        expected = [loader.batch(step, micro_batch) for step in range(3, 6) for micro_batch in range(2)]
    assert len(got) == len(expected)
    for batch, wanted in zip(got, expected, strict=True):
        assert_same(batch, wanted.packed, wanted.targets)


class Broken(SequenceStream):
    """A stream whose disk goes away, and which counts what is asked of it."""

    def __init__(self, stream: SequenceStream, end: int) -> None:
        self.capacity, self.end, self.asked = stream.capacity, end, 0
        self._good = stream

    def sequences(self, first: int, count: int) -> list[tuple[Plan, int]]:
        self.asked = max(self.asked, first + count)
        if first >= self.end:
            raise OSError("the disk went away")
        return self._good.sequences(first, count)

    def plan_ahead(self, first: int, count: int) -> None:
        self._good.plan_ahead(first, count)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_errors_are_raised_where_the_batch_is_read(stream: SequenceStream, workers: int) -> None:
    part = Slice(sequences_per_step=2, sequences_per_micro_batch=2)
    got = []
    with Loader(Broken(stream, 4), part, first_step=0, end_step=9, workers=workers) as loader:
        batches = iter(loader)
        got = [next(batches), next(batches)]
        with pytest.raises(OSError, match="the disk went away"):
            next(batches)
    assert len(got) == 2


def test_the_loader_reads_no_further_ahead_than_told_and_leaves_no_thread(stream: SequenceStream) -> None:
    before = set(threading.enumerate())
    counting = Broken(stream, 10**6)
    part = Slice(sequences_per_step=2, sequences_per_micro_batch=2)
    with Loader(counting, part, first_step=0, end_step=10**9, workers=2, prefetch=3) as loader:
        batches = iter(loader)
        for _ in range(5):
            next(batches)
    # Five were read, and three more are the most that may have been begun.
    assert 5 * 2 <= counting.asked <= 8 * 2
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_are_not_overwritten_while_they_are_copied(stream: SequenceStream) -> None:
    part = Slice(sequences_per_step=2, sequences_per_micro_batch=2)
    device = torch.device("cuda")
    with Loader(stream, part, first_step=0, end_step=40, workers=2, prefetch=2, pin=True) as loader:
        # Copies wait behind this, while the loader goes on to make batches.
        torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call, unused-ignore]
        copies = [batch.to(device) for batch in loader if batch.targets.is_pinned()]
        expected = [loader.batch(step, 0) for step in range(40)]
    torch.cuda.synchronize()
    assert len(copies) == 40
    for copy, wanted in zip(copies, expected, strict=True):
        assert torch.equal(copy.targets.cpu(), wanted.targets)
        assert torch.equal(copy.packed.tokens.cpu(), wanted.packed.tokens)


def test_memory_is_used_again_only_when_nobody_holds_it(stream: SequenceStream) -> None:
    builder = BatchBuilder(stream.capacity, 2)
    batches = [builder.build(stream.sequences(2 * index, 2)) for index in range(6)]
    kept = batches[1].packed.patch_offsets
    assert kept is not None
    expected = kept.clone()
    addresses = {batch.targets.data_ptr() for batch in batches}
    assert len(addresses) == 6
    where = batches[1].targets.data_ptr()
    del batches
    again = [builder.build(stream.sequences(20 + 2 * index, 2)) for index in range(6)]
    # Five are used again; of the other one, a single small tensor is still held.
    assert len(addresses & {batch.targets.data_ptr() for batch in again}) == 5
    assert where not in {batch.targets.data_ptr() for batch in again}
    assert torch.equal(kept, expected)
