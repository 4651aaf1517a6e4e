"""Shards: what is written is what is read, whole or not at all, and damage is seen."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_data import (
    InputError,
    Manifest,
    Shard,
    ShardDirectory,
    ShardEntry,
    ShardKind,
    entry_of_finished_shard,
    verify_directory,
    write_manifest,
    write_shard,
)
from blt_data.skips import SkipCount, Skips

CONTENTS = [b"", b"a", "Ünïcødé 日本語 🐍\r\n\0".encode(), bytes(range(256)), b"x" * 70_000]


def write_bytes(path: Path, contents: list[bytes] = CONTENTS) -> ShardEntry:
    ids = [f"doc/{index}" for index in range(len(contents))]
    return write_shard(
        path, kind=ShardKind.BYTES, document_ids=ids, contents=contents, sources=["s"] * len(ids), provenance={"a": [1]}
    )


def patched_columns(contents: list[bytes]) -> tuple[pa.Array, pa.Array]:
    """Patches of BOS alone and then all the rest; entropies that count up."""
    lengths = pa.array([[1, len(content) + 1] for content in contents], pa.list_(pa.uint16()))
    entropies = pa.array(
        [np.arange(len(content) + 2, dtype=np.float16) for content in contents], pa.list_(pa.float16())
    )
    return lengths, entropies


def write_patched(path: Path, contents: list[bytes], **changes: object) -> ShardEntry:
    lengths, entropies = patched_columns(contents)
    arguments: dict[str, object] = {
        "kind": ShardKind.PATCHED,
        "document_ids": [str(index) for index in range(len(contents))],
        "contents": contents,
        "sources": ["s"] * len(contents),
        "patch_lengths": lengths,
        "entropies": entropies,
        "provenance": {},
    }
    return write_shard(path, **(arguments | changes))  # type: ignore[arg-type]


def write_directory(path: Path, parts: list[list[bytes]]) -> Manifest:
    path.mkdir()
    entries = tuple(write_bytes(path / f"shard-{index:05d}.arrow", part) for index, part in enumerate(parts))
    skipped = Skips({"binary": SkipCount(count=2, bytes=30)})
    manifest = Manifest(kind=ShardKind.BYTES, shards=entries, provenance={"source": "test"}, skipped=skipped)
    write_manifest(path, manifest)
    return manifest


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=40), st.sampled_from(["", "b", "ß"]))),
    compression=st.sampled_from(["none", "zstd"]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[str, bytes, str]], compression: str
) -> None:
    path = tmp_path_factory.mktemp("shard") / "shard-00000.arrow"
    ids = [document[0] for document in documents]
    contents = [document[1] for document in documents]
    sources = [document[2] for document in documents]
    entry = write_shard(
        path,
        kind=ShardKind.BYTES,
        document_ids=ids,
        contents=contents,
        sources=sources,
        provenance={"ü": None},
        compression=compression,  # type: ignore[arg-type]
    )
    shard = Shard.open(path, verify=True)
    assert [shard.document_id(index) for index in range(len(shard))] == ids
    assert [shard.content(index).tobytes() for index in range(len(shard))] == contents
    assert [shard.source(index) for index in range(len(shard))] == sources
    offsets, data = shard.content_column()
    assert offsets.dtype == np.int64
    assert data.tobytes() == b"".join(contents)
    assert np.array_equal(np.diff(offsets), [len(content) for content in contents])
    assert (entry.documents, entry.bytes, entry.patches) == (len(ids), len(data), None)
    assert shard.provenance == {"ü": None}
    assert entry_of_finished_shard(path) == entry


def test_checksum_does_not_depend_on_compression_or_arrow_layout(tmp_path: Path) -> None:
    plain = write_bytes(tmp_path / "a.arrow")
    padded = pa.array([b"before", *CONTENTS, b"after"], pa.binary())
    sliced = write_shard(
        tmp_path / "b.arrow",
        kind=ShardKind.BYTES,
        document_ids=pa.array([f"doc/{index}" for index in range(len(CONTENTS))]),
        contents=padded.slice(1, len(CONTENTS)),
        sources=pa.DictionaryArray.from_arrays(pa.array([1] * len(CONTENTS), pa.int32()), pa.array(["unused", "s"])),
        provenance={"other": True},
        compression="zstd",
    )
    assert sliced.payload_sha256 == plain.payload_sha256
    assert sliced.file_crc32 != plain.file_crc32


def test_equal_input_gives_equal_files(tmp_path: Path) -> None:
    assert write_bytes(tmp_path / "a.arrow").file_crc32 == write_bytes(tmp_path / "b.arrow").file_crc32
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def test_patched_round_trip(tmp_path: Path) -> None:
    contents = [b"", b"a", b"hello"]
    entry = write_patched(tmp_path / "shard-00000.arrow", contents)
    shard = Shard.open(tmp_path / "shard-00000.arrow", verify=True)
    assert [list(shard.patch_lengths(index)) for index in range(3)] == [[1, 1], [1, 2], [1, 6]]
    assert [len(shard.entropies(index)) for index in range(3)] == [2, 3, 7]
    assert shard.patch_column()[1].dtype == np.uint16
    assert shard.entropy_column()[0].dtype == np.int64
    assert (entry.patches, entry.entropies, shard.has_entropies) == (6, True, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_lengths": pa.array([[1, 2], [1, 1]], pa.list_(pa.uint16()))}, "row 1: its patch lengths do not sum"),
        ({"patch_lengths": pa.array([[2, 1], [1, 2]], pa.list_(pa.uint16()))}, "row 0: its first patch is not BOS"),
        ({"patch_lengths": pa.array([[1, 2], [1, 0, 2]], pa.list_(pa.uint16()))}, "row 1: a patch has no token"),
        ({"patch_lengths": pa.array([[], [1, 2]], pa.list_(pa.uint16()))}, "row 0: its patch lengths do not sum"),
        ({"entropies": pa.array([[0.0] * 3, [0.0] * 2], pa.list_(pa.float16()))}, "row 1: its entropies"),
        ({"document_ids": ["a"]}, "2 documents, but 1 values of document_id"),
        ({"sources": pa.array(["a", None])}, "source has 1 nulls"),
        ({"kind": ShardKind.BYTES}, "has no patch lengths"),
        ({"patch_lengths": None}, "needs patch lengths"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_patched(tmp_path / "shard.arrow", [b"a", b"b"], **changes)
    assert list(tmp_path.iterdir()) == []


def test_views_are_not_copies_and_outlive_the_shard(tmp_path: Path) -> None:
    write_bytes(tmp_path / "s.arrow")
    shard = Shard.open(tmp_path / "s.arrow")
    before = pa.total_allocated_bytes()
    content, (_, data) = shard.content(4), shard.content_column()
    assert np.shares_memory(content, data)
    assert pa.total_allocated_bytes() == before
    assert not content.flags.writeable
    del shard, data
    assert content.tobytes() == CONTENTS[4]


def test_open_shards_hold_no_file_descriptor(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", [[b"a"], [b"b"], [b"c"]])
    before = len(os.listdir("/proc/self/fd"))
    directory = ShardDirectory.open(tmp_path / "d")
    assert [directory.shard(shard).content(row).tobytes() for shard, row in directory.documents()] == [b"a", b"b", b"c"]
    assert directory.shard(1) is directory.shard(1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_pickles_name_files_and_hold_no_content(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", [[b"x" * 100_000]])
    directory = ShardDirectory.open(tmp_path / "d")
    for value in (directory.shard(0), directory):
        assert len(pickle.dumps(value)) < 2000
    assert pickle.loads(pickle.dumps(directory)).shard(0).content(0).tobytes() == b"x" * 100_000
    assert pickle.loads(pickle.dumps(directory.shard(0))).num_bytes == 100_000


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = write_directory(tmp_path / "d", [CONTENTS, [], [b"z"]])
    directory = ShardDirectory.open(tmp_path / "d", kind=ShardKind.BYTES, verify=True)
    assert directory.manifest == manifest
    assert (len(directory), directory.kind, manifest.documents) == (3, ShardKind.BYTES, len(CONTENTS) + 1)
    assert manifest.bytes == sum(map(len, CONTENTS)) + 1
    assert list(directory.documents())[-1] == (2, 0)


def test_fingerprint_names_content_and_order(tmp_path: Path) -> None:
    first, second = write_bytes(tmp_path / "a.arrow"), write_bytes(tmp_path / "b.arrow", [b"q"])
    manifest = Manifest(kind=ShardKind.BYTES, shards=(first, second))
    assert manifest.fingerprint() != Manifest(kind=ShardKind.BYTES, shards=(second, first)).fingerprint()
    other_file = dataclasses.replace(first, file_bytes=0, file_crc32="")
    assert manifest.fingerprint() == dataclasses.replace(manifest, shards=(other_file, second)).fingerprint()


def test_every_flipped_byte_is_found_and_none_crashes_the_reader(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", [[b"", b"hello", b"world"]])
    path = tmp_path / "d" / "shard-00000.arrow"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        problems = verify_directory(tmp_path / "d")
        assert len(problems) == 1
        assert str(path) in problems[0]
        # Bytes that are padding or that only Arrow's own header repeats may be lost on the shard alone.
        with suppress(InputError):
            assert len(Shard.open(path, verify=True)) == 3
    path.write_bytes(whole)
    assert verify_directory(tmp_path / "d") == []


def test_flipped_content_byte_is_found_without_a_manifest(tmp_path: Path) -> None:
    write_bytes(tmp_path / "s.arrow", [b"needle in the hay"])
    damaged = (tmp_path / "s.arrow").read_bytes().replace(b"needle", b"noodle")
    (tmp_path / "s.arrow").write_bytes(damaged)
    with pytest.raises(InputError, match=r"s\.arrow: is a damaged shard .*checksum.*run the command"):
        Shard.open(tmp_path / "s.arrow", verify=True)
    assert entry_of_finished_shard(tmp_path / "s.arrow") is None


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    write_bytes(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="truncated"):
            Shard.open(path)
        assert entry_of_finished_shard(path) is None
    with pytest.raises(InputError, match="no such shard"):
        Shard.open(tmp_path / "absent.arrow")
    with pytest.raises(InputError, match="directory"):
        Shard.open(tmp_path)
    table = pa.table({"a": [1]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="no shard"):
        Shard.open(path)


def rewrite(path: Path, metadata: dict[bytes, bytes], batches: int = 1) -> None:
    """Write a shard again with other schema metadata or more than one record batch."""
    with pa.ipc.open_file(str(path)) as reader:
        batch, schema = reader.get_batch(0), reader.schema
    changed = schema.with_metadata(schema.metadata | metadata)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, changed) as writer:
        for _ in range(batches):
            writer.write_batch(pa.record_batch(batch.columns, schema=changed))


@pytest.mark.parametrize(
    ("metadata", "batches", "message"),
    [
        ({b"blt.version": b"2"}, 1, "format version 2, this program reads version 1; update blt-data"),
        ({b"blt.kind": b"tokens"}, 1, "tokens"),
        ({b"blt.kind": b"patched"}, 1, "columns are not those of a shard of kind patched"),
        ({b"blt.bytes": b"1"}, 1, "figures do not agree"),
        ({b"blt.provenance": b"{"}, 1, "damaged"),
        ({}, 2, "2 record batches"),
    ],
)
def test_wrong_version_kind_or_figures_are_refused(
    tmp_path: Path, metadata: dict[bytes, bytes], batches: int, message: str
) -> None:
    path = tmp_path / "s.arrow"
    write_bytes(path)
    rewrite(path, metadata, batches)
    with pytest.raises(InputError, match=message) as caught:
        Shard.open(path)
    assert str(path) in str(caught.value)


def test_directory_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", [[b"a"]])
    with pytest.raises(InputError, match="needed is kind patched; run blt-patch precompute"):
        ShardDirectory.open(tmp_path / "d", kind=ShardKind.PATCHED)
    shard = ShardDirectory.open(tmp_path / "d").shard(0)
    with pytest.raises(InputError, match="run blt-patch precompute"):
        shard.patch_lengths(0)
    with pytest.raises(InputError, match="--entropies float16"):
        shard.entropy_column()


def test_incomplete_and_damaged_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        ShardDirectory.open(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        ShardDirectory.open(tmp_path)
    write_directory(tmp_path / "train", [[b"a"], [b"b"]])
    with pytest.raises(InputError, match=f"holds train, each a shard directory of its own; name {tmp_path}/train"):
        ShardDirectory.open(tmp_path)
    (tmp_path / "train" / "shard-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"shard-00001\.arrow: is missing"):
        ShardDirectory.open(tmp_path / "train")
    assert "is missing" in verify_directory(tmp_path / "train")[0]


def test_swapped_and_surplus_shards_are_found(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", [[b"a"], [b"b"]])
    first, second = tmp_path / "d" / "shard-00000.arrow", tmp_path / "d" / "shard-00001.arrow"
    first.rename(tmp_path / "d" / "shard-00002.arrow")
    first.write_bytes(second.read_bytes())
    problems = verify_directory(tmp_path / "d")
    assert [str(first) in problems[0], "shard-00002.arrow: is not named" in problems[1]] == [True, True]
    with pytest.raises(InputError, match="is not the shard that"):
        ShardDirectory.open(tmp_path / "d").shard(0)
    with pytest.raises(InputError, match="checksum"):
        ShardDirectory.open(tmp_path / "d", verify=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "is no shard manifest"),
        ('{"format": "blt-shards", "version": 9}', "version 9"),
        (
            '{"format": "blt-shards", "version": 1, "kind": "bytes", "shards": []}',
            "format version 1, this program reads",
        ),
        ('{"format": "blt-shards", "version": 2, "kind": "bytes"}', r"damaged \(it has no 'shards'\)"),
        ("[" * 100_000, "no JSON"),
        ('{"documents": ' + "9" * 5000 + "}", "no JSON"),
    ],
)
def test_damaged_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=rf"manifest\.json: .*{message}"):
        ShardDirectory.open(tmp_path)


@pytest.mark.parametrize("key", ["documents", "bytes", "fingerprint"])
def test_manifest_changed_by_hand_is_refused(tmp_path: Path, key: str) -> None:
    write_directory(tmp_path / "d", [[b"a"]])
    path = tmp_path / "d" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 5}))
    with pytest.raises(InputError, match=f"its {key} does not agree"):
        ShardDirectory.open(tmp_path / "d")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../train/shard-00000.arrow"),
        ("name", "/etc/passwd"),
        ("name", ""),
        ("name", ".."),
        ("name", "a\0b"),
        ("name", "\ud800"),
        ("name", None),
        ("documents", -1),
        ("documents", 1.0),
        ("documents", "1"),
        ("documents", True),
        ("documents", None),
        ("bytes", -1),
        ("file_bytes", 10**30),
        ("patches", 1),
        ("entropies", True),
        ("entropies", "no"),
        ("payload_sha256", None),
        ("file_crc32", "abc"),
    ],
)
def test_entries_that_no_shard_has_are_refused(tmp_path: Path, key: str, value: object) -> None:
    write_directory(tmp_path / "d", [[b"a"], [b"b"]])
    path = tmp_path / "d" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1][key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"manifest\.json: is damaged \(the {key} of a shard cannot be "):
        ShardDirectory.open(tmp_path / "d")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shards", {}, "its shards must be a list"),
        ("shards", None, "its shards must be a list"),
        ("provenance", [], "its provenance must be an object"),
        ("skipped", [], "its skipped must be an object"),
        ("skipped", {"why": "many"}, "its skipped must be counts"),
        ("skipped", {"why": -1}, "its skipped must be counts"),
        ("skipped", {"why": 1}, "its skipped must be counts"),
        ("skipped", {"why": {"count": 1}}, "its skipped must be counts"),
        ("skipped", {"why": {"count": 1, "bytes": 1.0}}, "its skipped must be counts"),
        ("skipped", {"why": {"count": True, "bytes": 1}}, "its skipped must be counts"),
        ("kind", [], "not a valid ShardKind"),
    ],
)
def test_manifest_of_another_shape_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    write_directory(tmp_path / "d", [[b"a"]])
    path = tmp_path / "d" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=rf"manifest\.json: is damaged \(.*{message}"):
        ShardDirectory.open(tmp_path / "d")


def test_manifest_that_names_a_shard_twice_is_refused(tmp_path: Path) -> None:
    entry = write_bytes(tmp_path / "shard-00000.arrow")
    write_manifest(tmp_path, Manifest(kind=ShardKind.BYTES, shards=(entry, entry)))
    with pytest.raises(InputError, match="it names a shard twice"):
        ShardDirectory.open(tmp_path)


@pytest.mark.parametrize("changes", [{"documents": 4}, {"bytes": 0}])
def test_shard_with_other_figures_than_its_manifest_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    entry = dataclasses.replace(write_bytes(tmp_path / "shard-00000.arrow"), **changes)
    write_manifest(tmp_path, Manifest(kind=ShardKind.BYTES, shards=(entry,)))
    with pytest.raises(InputError, match=r"shard-00000\.arrow: is not the shard that manifest\.json names"):
        ShardDirectory.open(tmp_path).shard(0)


def test_verified_shard_sees_every_flipped_byte(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", [[b"some text"]])
    directory = ShardDirectory.open(tmp_path / "d")
    assert directory.verified_shard(0).content(0).tobytes() == b"some text"
    path = tmp_path / "d" / "shard-00000.arrow"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(InputError, match=r"shard-00000\.arrow: does not have the checksum"):
            directory.verified_shard(0)


def test_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """A limit on file size fails a write half-way, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_bytes(tmp_path / "s.arrow")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    program = (
        "import sys; from blt_data import ShardKind, write_shard\n"
        "while True: write_shard(sys.argv[1], kind=ShardKind.BYTES, document_ids=['a'],"
        " contents=[bytes(30_000_000)], sources=['s'], provenance={})"
    )
    path = tmp_path / "shard-00000.arrow"
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    try:
        while not list(tmp_path.glob(".*.tmp-*")):
            assert writer.poll() is None
            time.sleep(0.001)
    finally:
        writer.kill()
        writer.wait()
    assert not path.exists() or entry_of_finished_shard(path) is not None
    entry = write_bytes(path)
    write_manifest(tmp_path, Manifest(kind=ShardKind.BYTES, shards=(entry,)))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "shard-00000.arrow"]
