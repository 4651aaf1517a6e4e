"""The stream of sequences: epochs and groups end to end, mixtures, bounded memory, and counts that are only a cache."""

from __future__ import annotations

import gc
import json
import tempfile
import threading
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_train.samples import (
    blt_config,
    source_stream,
    stream_of,
    table_of,
    text_documents,
    write_documents,
    write_patched,
)

from blt_data import InputError
from blt_data.shards import Manifest, Shard, ShardDirectory, ShardEntry, ShardKind
from blt_model.packed import IGNORED_TARGET
from blt_train import source_stream as source_stream_module
from blt_train import train
from blt_train.batches import BatchBuilder
from blt_train.documents import DocumentTable
from blt_train.errors import CheckpointError
from blt_train.groups import ShardGroups
from blt_train.inputs import open_inputs
from blt_train.plan import Capacity, Plan, plan_epoch
from blt_train.sequence_counts import COUNTS_NAME
from blt_train.sequences import SequenceStream
from blt_train.source_stream import SourceStream

SMALL = Capacity(tokens=64, patches=0, documents=4)


def contents_of(plan: Plan, row: int) -> list[tuple[bytes, int, int]]:
    """The pieces of a sequence: content of the document, start and end."""
    table = plan.documents
    pieces = range(plan.first_piece[row], plan.first_piece[row] + plan.num_pieces[row])
    found = []
    for piece in pieces:
        document = int(plan.piece_document[piece])
        address, size = int(table.content_address[document]), int(table.tokens[document]) - 1
        column = next(
            item for item in table.columns if item.ctypes.data <= address <= item.ctypes.data + item.size - size
        )
        start = address - column.ctypes.data
        content = column[start : start + size].tobytes()
        found.append((content, int(plan.piece_start[piece]), int(plan.piece_end[piece])))
    return found


def numbered(count: int, words: int = 12) -> list[bytes]:
    """Documents that are all different, of different lengths."""
    return [b"document %d " % index + b"word " * (index % words) for index in range(count)]


def test_stream_says_the_same_to_all_threads(tmp_path: Path) -> None:
    directory = write_documents(tmp_path / "d", text_documents(12))
    count = 5 * plan_epoch(table_of(directory), SMALL, seed=0, epoch=0).num_sequences
    alone = source_stream(directory, SMALL)
    expected = [alone.locate(index) for index in range(count)]
    for _ in range(20):
        stream, together = source_stream(directory, SMALL), threading.Barrier(4)

        def ask(stream: SourceStream = stream, together: threading.Barrier = together) -> list[tuple[int, int]]:
            together.wait()
            return [stream.locate(index) for index in range(count)]

        with ThreadPoolExecutor(4) as pool:
            for answers in [pool.submit(ask) for _ in range(4)]:
                assert answers.result() == expected


def test_stream_flows_over_epochs(tmp_path: Path) -> None:
    directory = write_documents(tmp_path / "d", text_documents(12))
    table = table_of(directory)
    stream = source_stream(directory, SMALL)
    counts = [plan_epoch(table, SMALL, seed=0, epoch=epoch).num_sequences for epoch in range(3)]
    located = [stream.locate(index) for index in range(sum(counts))]
    assert located == [(epoch, index) for epoch, count in enumerate(counts) for index in range(count)]
    # A fresh stream, asked in another order, says the same.
    assert source_stream(directory, SMALL).locate(sum(counts) - 1) == located[-1]
    figures = stream_of(directory, SMALL).figures(0, counts[0])
    assert (figures.targets, figures.bytes, figures.epoch) == (table.num_targets, table.num_bytes, 1.0)
    assert figures.document_tokens.sum() == table.num_targets


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_groups_hold_every_document_once(rows: list[int], limit: int, seed: int, epoch: int) -> None:
    entries = tuple(
        ShardEntry(
            name=f"shard-{index:05d}.arrow", documents=count, bytes=count, patches=None, entropies=False,
            payload_sha256="0" * 64, file_bytes=count, file_crc32="0" * 8,
        )
        for index, count in enumerate(rows)
    )  # fmt: skip
    directory = ShardDirectory(Path("d"), Manifest(kind=ShardKind.BYTES, shards=entries))
    groups = ShardGroups(directory, seed=seed, group_documents=limit)
    found = groups.shards_of_epoch(epoch)
    members = [index for group in found for index in group]
    if groups.is_one_group:
        assert members == list(range(len(rows)))
        return
    assert sorted(members) == [index for index, count in enumerate(rows) if count]
    for group in found:
        assert group
        assert sum(rows[index] for index in group) <= limit or len(group) == 1
    assert groups.shares_of_epoch(epoch)[-1] == 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 12),
    st.tuples(st.integers(4, 40), st.integers(4, 12), st.integers(2, 5)),
    st.booleans(),
)
def test_any_data_in_any_groups_is_read_once_an_epoch(
    sizes: list[int], shards: int, limit: int, capacity: tuple[int, int, int], patched: bool
) -> None:
    documents = [b"%d " % index + b"ab " * (size // 3) for index, size in enumerate(sizes)]
    tokens, patches, most = capacity
    with tempfile.TemporaryDirectory() as folder:
        write = write_patched if patched else write_documents
        directory = write(Path(folder) / "d", documents, num_shards=shards)
        room = Capacity(tokens=tokens, patches=patches if patched else 0, documents=most)
        stream = SequenceStream({"d": source_stream(directory, room, group_documents=limit)})
        targets: Counter[tuple[bytes, int]] = Counter()
        index, epoch = 0, 0.0
        builder = BatchBuilder(room, 1)
        while epoch < 2:
            plan, row = stream.sequences(index, 1)[0]
            # That the batch holds what the plan says, the tests of the loader show.
            assert int((builder.build([(plan, row)]).targets != IGNORED_TARGET).sum()) == plan.sequence_tokens[row]
            for content, start, end in contents_of(plan, row):
                targets.update((content, token) for token in range(start, end))
            epoch = stream.figures(index, 1).epoch
            index += 1
    assert epoch == 2
    assert targets == Counter({(content, token): 2 for content in documents for token in range(len(content) + 1)})


@pytest.mark.parametrize("patched", [False, True])
def test_grouped_epochs_predict_every_target_once(tmp_path: Path, patched: bool) -> None:
    documents = numbered(90)
    write = write_patched if patched else write_documents
    directory = write(tmp_path / "d", documents, num_shards=7)
    capacity = Capacity(tokens=48, patches=20 if patched else 0, documents=5)
    stream = source_stream(directory, capacity, group_documents=30)
    orders = []
    for epoch in range(2):
        first = 0
        while stream.place(stream.locate(first)[0])[0] < epoch:
            first += 1
        order, index = [], first
        while stream.place(stream.locate(index)[0])[0] == epoch:
            number, row = stream.locate(index)
            order += contents_of(stream.plan(number), row)
            index += 1
        targets = Counter((content, token) for content, start, end in order for token in range(start, end))
        assert targets == Counter((content, token) for content in documents for token in range(len(content) + 1))
        assert stream.passes(index) == pytest.approx(epoch + 1)
        orders.append([content for content, _, _ in order])
    assert stream.place(stream.locate(first)[0]) == (1, 0)
    assert len(stream.groups.shards_of_epoch(0)) == 4
    assert stream.groups.shards_of_epoch(0) != stream.groups.shards_of_epoch(1)
    assert orders[0] != orders[1]
    # Another seed puts other shards together.
    assert source_stream(directory, capacity, seed=1, group_documents=30).groups.shards_of_epoch(
        0
    ) != stream.groups.shards_of_epoch(0)


def all_columns(stream: SourceStream, count: int) -> Iterator[DocumentTable]:
    """Go through the first sequences, yielding the table of each group at its first."""
    latest = -1
    for index in range(count):
        number, _ = stream.locate(index)
        if number != latest:
            latest = number
            yield stream.plan(number).documents


def test_memory_is_that_of_a_few_groups(tmp_path: Path) -> None:
    # 60,000 documents in 60 shards: indexed at once against 60 groups.
    directory = tmp_path / "d"
    write_documents(directory, [b"%d" % (index % 10) for index in range(60_000)], num_shards=60)
    capacity = Capacity(tokens=512, patches=0, documents=600)
    peaks = {}
    for limit in (1000, 10**9):
        stream = source_stream(directory, capacity, group_documents=limit)
        count = 60_000 * 2 // 512
        tracemalloc.start()
        seen = [weakref.ref(table.columns[0]) for table in all_columns(stream, count)]
        gc.collect()
        peaks[limit] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        alive = sum(reference() is not None for reference in seen)
        assert alive <= 3
        assert (len(seen) > 50) == (limit == 1000)
    assert peaks[1000] * 8 < peaks[10**9]


def test_opening_a_large_corpus_reads_only_its_first_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_patched(tmp_path / "patched", numbered(80), num_shards=8)
    opened: list[str] = []
    before = Shard.open.__func__  # type: ignore[attr-defined]

    def open_shard(cls: type[Shard], path: Path, *, verify: bool = False) -> Shard:
        opened.append(Path(path).name)
        shard: Shard = before(cls, path, verify=verify)
        return shard

    monkeypatch.setattr(Shard, "open", classmethod(open_shard))
    overrides = ["data.group_documents=20", "data.sequence_tokens=64"]
    inputs = open_inputs(blt_config(tmp_path, "run", *overrides), verify=True)
    assert len(set(opened)) == 2
    opened.clear()
    sizes = [f"data.sequence_patches={inputs.capacity.patches}", "data.sequence_documents=9"]
    stream = open_inputs(blt_config(tmp_path, "run", *overrides, *sizes), verify=True).open_stream()
    assert opened == []
    stream.sequences(0, 1)
    assert len(set(opened)) == 2


def test_shards_of_groups_are_verified_when_they_are_read(tmp_path: Path) -> None:
    directory = write_patched(tmp_path / "patched", numbered(80), num_shards=8)
    config = blt_config(tmp_path, "run", "data.group_documents=20", "data.sequence_tokens=64")
    damaged = ShardDirectory.open(directory).manifest.shards[3].name
    content = bytearray((directory / damaged).read_bytes())
    where = content.index(b"word word")
    content[where : where + 4] = b"WORD"
    (directory / damaged).write_bytes(content)
    stream = open_inputs(config, verify=True).open_stream()
    with pytest.raises(InputError, match=damaged):
        stream.figures(0, 60)
    with pytest.raises(InputError, match=damaged):
        open_inputs(blt_config(tmp_path, "run"), verify=True)
    assert open_inputs(config, verify=False).open_stream().figures(0, 60).targets > 0


def test_groups_are_planned_before_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_documents(tmp_path / "d", numbered(90), num_shards=6)
    capacity = Capacity(tokens=48, patches=0, documents=5)
    source = source_stream(directory, capacity, group_documents=15)
    stream = SequenceStream({"train": source})
    stream.plan_ahead(0, 2)
    assert source.claim_next(0) is None  # as small a group as this is planned when it is needed
    monkeypatch.setattr(source_stream_module, "AHEAD_DOCUMENTS", 10)
    stream.plan_ahead(0, 2)
    for thread in threading.enumerate():
        if thread.name == "planner":
            thread.join()
    assert list(source._kept) == [0, 1]
    assert source.claim_next(0) is None


def mixture(tmp_path: Path, weights: dict[str, float], *, group_documents: int = 10**9) -> SequenceStream:
    """A stream over one source per weight, each with documents of its own."""
    streams = {}
    for index, name in enumerate(weights):
        directory = tmp_path / name
        if not directory.exists():
            write_documents(directory, text_documents(10 + 20 * index, seed=index), num_shards=4)
        streams[name] = source_stream(directory, SMALL, group_documents=group_documents)
    return SequenceStream(streams, weights=weights, seed=5)


def test_a_mixture_keeps_shares_and_each_sources_order(tmp_path: Path) -> None:
    weights = {"web": 6.0, "code": 3.0, "math": 1.0}
    stream = mixture(tmp_path, weights)
    alone = {name: source_stream(tmp_path / name, SMALL) for name in weights}
    tables = {str(tmp_path / name): name for name in weights}
    chosen = stream.sequences(0, 200)
    by_source: dict[str, list[list[tuple[bytes, int, int]]]] = {name: [] for name in weights}
    for plan, row in chosen:
        by_source[tables[plan.documents.path]].append(contents_of(plan, row))
    for name, weight in weights.items():
        assert len(by_source[name]) == pytest.approx(200 * weight / 10, abs=2)
        places = [alone[name].locate(index) for index in range(len(by_source[name]))]
        assert by_source[name] == [contents_of(alone[name].plan(group), row) for group, row in places]
    figures = stream.figures(0, 200)
    for name, source in figures.sources.items():
        assert source.share == len(by_source[name]) / 200
        assert source.epoch == alone[name].passes(len(by_source[name]))
        assert source.targets == sum(end - start for row in by_source[name] for _, start, end in row)
    assert figures.targets == sum(source.targets for source in figures.sources.values())
    assert figures.epoch > 0
    # Asked for in other portions, and listed in another order, it is the same.
    other = mixture(tmp_path, dict(reversed(weights.items())))
    again = [item for first in range(0, 200, 8) for item in other.sequences(first, 8)]
    assert [contents_of(*item) for item in again] == [contents_of(*item) for item in chosen]
    parts = [other.figures(first, 50) for first in range(0, 200, 50)]
    assert sum(part.bytes for part in parts) == figures.bytes
    assert parts[-1].sources["web"].epoch == figures.sources["web"].epoch


def test_every_source_has_epochs_of_its_own(tmp_path: Path) -> None:
    stream = mixture(tmp_path, {"small": 1, "large": 1}, group_documents=12)
    count = 0
    while stream.figures(count, 1).sources["large"].epoch < 2:
        count += 1
    figures = stream.figures(count, 1)
    assert figures.sources["small"].epoch > 5
    seen = Counter(
        (content, token)
        for plan, row in stream.sequences(0, count + 1)
        for content, start, end in contents_of(plan, row)
        for token in range(start, end)
        if plan.documents.path.endswith("large")
    )
    documents = Counter(text_documents(30, seed=1))
    expected = {
        (content, token): 2 * times for content, times in documents.items() for token in range(len(content) + 1)
    }
    assert seen == expected


def test_counts_are_only_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_patched(tmp_path / "patched", numbered(80), num_shards=8)
    overrides = ["data.group_documents=20", "data.sequence_tokens=64"]
    inputs = open_inputs(blt_config(tmp_path, "run", *overrides), verify=False)
    run = tmp_path / "run"
    run.mkdir()
    stream = inputs.open_stream(run)
    stream.save_counts(run)
    assert not (run / COUNTS_NAME).exists()  # nothing is known yet
    expected = [contents_of(*item) for item in stream.sequences(300, 8)]
    stream.save_counts(run)
    planned: list[int] = []
    make = SourceStream._make

    def counted(self: SourceStream, number: int) -> Plan:
        planned.append(number)
        return make(self, number)

    monkeypatch.setattr(SourceStream, "_make", counted)

    def read() -> int:
        planned.clear()
        found = inputs.open_stream(run)
        assert [contents_of(*item) for item in found.sequences(300, 8)] == expected
        return len(planned)

    assert read() <= 2
    content = json.loads((run / COUNTS_NAME).read_text())
    counts = content["sources"]["train"]["counts"]
    assert len(counts) > 4
    # Without the file, with a damaged one, and with one of other data, it takes longer and is the same.
    for text in ("{", "[]", "3", json.dumps({**content, "format_version": 0}), "{}"):
        (run / COUNTS_NAME).write_text(text)
        assert read() >= len(counts)
    for entry in ({"key": "other", "counts": [1]}, {"key": content["sources"]["train"]["key"], "counts": [0]}):
        (run / COUNTS_NAME).write_text(json.dumps({**content, "sources": {"train": entry}}))
        assert read() >= len(counts)
    (run / COUNTS_NAME).unlink()
    assert read() >= len(counts)
    # Numbers that are not those of the data are noticed when a group is planned.
    wrong = {"key": content["sources"]["train"]["key"], "counts": [1000, *counts]}
    (run / COUNTS_NAME).write_text(json.dumps({**content, "sources": {"train": wrong}}))
    with pytest.raises(CheckpointError, match="delete that file"):
        inputs.open_stream(run).sequences(300, 8)


def test_a_grouped_run_resumes_with_and_without_counts(tmp_path: Path) -> None:
    write_patched(tmp_path / "patched", numbered(80), num_shards=8)
    shared = [
        "data.group_documents=20",
        "data.sequence_tokens=64",
        "batch.sequences_per_step=8",
        "evaluation.every=null",
    ]
    whole = train(blt_config(tmp_path, "whole", *shared, "schedule.total_steps=6", "checkpoint.every=3"))
    steps = [item.loss for item in whole.steps]
    run = tmp_path / "whole"
    for keep in (True, False):
        (run / "latest").unlink()
        (run / "latest").symlink_to("checkpoints/step-00000003")
        if not keep:
            (run / COUNTS_NAME).unlink()
        resumed = train(blt_config(tmp_path, "whole", *shared, "schedule.total_steps=6", "checkpoint.every=3"))
        assert [item.loss for item in resumed.steps] == steps
        assert (run / COUNTS_NAME).exists()


def test_table_names_the_sources(tmp_path: Path) -> None:
    directory = write_documents(tmp_path / "d", [b"a", b"b", b"c", b"d"], sources=["web", "code", "web", "math"])
    table = table_of(directory)
    assert table.source_names == ("code", "math", "web")
    # Rows 0 and 2 are in the first shard, 1 and 3 in the second.
    assert [table.source_names[index] for index in table.source] == ["web", "web", "code", "math"]
    assert table.source.dtype == np.int32
