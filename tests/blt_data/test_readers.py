"""Readers: documents of every format equal an independent reading, and bad rows go where they should."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_data import InputError, ShardKind, write_shard
from blt_data.columns import ColumnError
from blt_data.documents import BATCH_BYTES
from blt_data.errors import SetupError
from blt_data.sample import UNDECODABLE
from blt_data.skips import ErrorPolicy, OnError

from .corpora import HARD_TEXTS, json_lines, write_compressed
from .reading import Found, plan_of, read_plan, read_source

IDS = [f"id-{index}" for index in range(len(HARD_TEXTS))]


def skipping() -> ErrorPolicy:
    return ErrorPolicy(OnError.SKIP)


def write_arrow(path: Path, table: pa.Table, *, stream: bool, compression: str | None = None, rows: int = 4) -> None:
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)


def independent(path: Path) -> list[tuple[str, bytes]]:
    """Return (id, content) of a file, by the plainest means there are."""
    if path.suffix == ".parquet":
        records = pq.read_table(path).to_pylist()
    elif path.suffix in (".arrow", ".feather"):
        data = path.read_bytes()
        opened = pa.ipc.open_file(data) if data.startswith(b"ARROW1") else pa.ipc.open_stream(data)
        records = opened.read_all().to_pylist()
    else:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".zst":
            data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()
        records = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
    found = []
    for row, record in enumerate(records, start=1):
        text = record["text"]
        content = text if isinstance(text, bytes) else text.encode()
        name = record.get("id")
        found.append((str(name) if name not in (None, "") else f"{path.name}#{row}", content))
    return found


TYPES = {
    "string": lambda texts: pa.array(texts, pa.string()),
    "large": lambda texts: pa.array(texts, pa.large_string()),
    "binary": lambda texts: pa.array([text.encode() for text in texts], pa.binary()),
    "large-binary": lambda texts: pa.array([text.encode() for text in texts], pa.large_binary()),
    "dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "view": lambda texts: pa.array(texts, pa.string_view()),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", ["parquet", "file", "stream", "file-zstd", "stream-lz4"])
def test_columns_of_every_type_arrive(tmp_path: Path, kind: str, form: str) -> None:
    table = pa.table({"other": IDS, "text": TYPES[kind](HARD_TEXTS), "id": TYPES[kind](IDS)})
    if form == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(table, path, row_group_size=3, compression="zstd")
    else:
        path = tmp_path / ("a.arrow" if form.startswith("file") else "a.feather")
        layout, _, codec = form.partition("-")
        write_arrow(path, table, stream=layout == "stream", compression=codec or None)
    found = read_source(path)
    assert [row[3:] for row in found] == list(zip(IDS, [text.encode() for text in HARD_TEXTS], strict=True))
    assert [row[:3] for row in found] == [(path.name, path.name, row) for row in range(1, len(IDS) + 1)]


FORMS: Sequence[tuple[str, Callable[[Path, list[str], list[object]], None]]] = [
    ("a.jsonl", lambda path, texts, ids: write_compressed(path, lines_of(texts, ids))),
    ("a.jsonl.gz", lambda path, texts, ids: write_compressed(path, lines_of(texts, ids))),
    ("a.jsonl.zst", lambda path, texts, ids: write_compressed(path, lines_of(texts, ids))),
    ("a.parquet", lambda path, texts, ids: pq.write_table(table_of(texts, ids), path, row_group_size=3)),
    ("a.arrow", lambda path, texts, ids: write_arrow(path, table_of(texts, ids), stream=False)),
    ("a.feather", lambda path, texts, ids: write_arrow(path, table_of(texts, ids), stream=True)),
]


def lines_of(texts: list[str], ids: list[object]) -> bytes:
    records = ({"text": text, "id": name} for text, name in zip(texts, ids, strict=True))
    return b"\r\n".join(json.dumps(record, ensure_ascii=len(texts) % 2 == 0).encode() for record in records)


def table_of(texts: list[str], ids: list[object]) -> pa.Table:
    names = None if any(isinstance(name, str) for name in ids) else pa.int64()
    return pa.table({"text": pa.array(texts, pa.string()), "id": pa.array(ids, names or pa.string())})


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=12),
    strings=st.booleans(),
    data=st.data(),
    form=st.sampled_from(FORMS),
)
def test_any_documents_arrive_as_an_independent_reader_finds_them(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    strings: bool,
    data: st.DataObject,
    form: tuple[str, Callable[[Path, list[str], list[object]], None]],
) -> None:
    name = st.none() | (st.text(max_size=5) if strings else st.integers(-(2**63), 2**63 - 1))
    ids = data.draw(st.lists(name, min_size=len(texts), max_size=len(texts)))
    path = tmp_path_factory.mktemp("any") / form[0]
    form[1](path, texts, ids)
    assert [row[3:] for row in read_source(path, shard_bytes=20)] == independent(path)


def test_batches_are_cut_by_size_not_by_rows(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "y" * 5_000_000, "", "z" * (2 * BATCH_BYTES), "w", "é" * 4_000_000, "v"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(json_lines(texts))
    write_arrow(tmp_path / "c.arrow", pa.table({"text": texts}), stream=False, rows=100)
    # `reading` checks the size of every batch.
    assert [row[4].decode() for row in read_source(tmp_path)] == texts * 3


def test_our_own_shards_are_a_source(tmp_path: Path) -> None:
    contents = [text.encode() for text in HARD_TEXTS]
    sources = pa.array(["s"] * len(IDS)).dictionary_encode()
    path = tmp_path / "shard-00000.arrow"
    write_shard(
        path,
        kind=ShardKind.BYTES,
        document_ids=IDS,
        contents=pa.array(contents, pa.large_binary()),
        sources=sources,
        provenance={},
    )
    assert [row[3:] for row in read_source(path)] == list(zip(IDS, contents, strict=True))


def test_lines_never_fuse_across_files_or_frames(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a1"}\n{"text": "a2"}')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b1"}\n{"te') + gzip.compress(b'xt": "b2"}'))
    frames = [zstandard.compress(part) for part in (b'{"text": "c', b'1"}\n', b"", b'{"text": "c2"}')]
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    (tmp_path / "c.jsonl.zst").write_bytes(frames[0] + skippable + b"".join(frames[1:]))
    write_compressed(tmp_path / "d.jsonl.zst", b'{"text": "d1"}')
    assert [row[4] for row in read_source(tmp_path)] == [b"a1", b"a2", b"b1", b"b2", b"c1", b"c2", b"d1"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_frames_are_found_wherever_they_end(tmp_path: Path, suffix: str) -> None:
    generator = np.random.default_rng()
    texts = [generator.bytes(300).hex() for _ in range(30)]
    path = tmp_path / f"a.jsonl.{suffix}"
    write_compressed(path, json_lines(texts))
    whole = path.read_bytes()
    for length in {0, 1, 4, 9, len(whole) - 1, len(whole) - 4, *generator.integers(1, len(whole), 20).tolist()}:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"a.jsonl.{suffix}: is a damaged or truncated"):
            read_source(path)
        policy = skipping()
        found = [row[4].decode() for row in read_plan(plan_of(path), policy)]
        assert found == texts[: len(found)]
        assert len(found) < len(texts)
        assert set(policy.skips) == {"damaged file"}


BAD_LINES: Sequence[tuple[bytes, str, str]] = [
    (b'{"text": "a"', "no JSON object", r"line 2 is no JSON \("),
    (b'{"text": "\xff"}', "no UTF-8", r"line 2 is no UTF-8 \(byte 11 of the line\)"),
    (b'{"text": "\\ud800"}', "no UTF-8", r"line 2 has a lone surrogate \(\\ud800\)"),
    (b'{"text": "t", "id": "\\udfff"}', "no UTF-8", "line 2 has a lone surrogate"),
    (b'["text"]', "no JSON object", "line 2 is a list, not a JSON object"),
    (b'{"text": null}', "no text", "line 2 has no text: 'text' is null, not a string"),
    (b'{"text": {"a": 1}}', "no text", "line 2 has no text: 'text' is an object"),
    (b'{"body": "b", "url": 1}', "no text", "line 2 has no text: no 'text' among its keys 'body', 'url'; "),
    (b'{"text": "t", "id": 1.5}', "unusable id", "line 2 has an unusable id: 'id' is a number"),
    (b'{"text": "t", "id": true}', "unusable id", "line 2 has an unusable id: 'id' is true or false"),
    (b"[" * 100_000, "no JSON object", "line 2 is no JSON"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_bad_lines(tmp_path: Path, line: bytes, reason: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after", "id": "x"}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl: {message}") as caught:
        read_source(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)
    policy = skipping()
    found = read_plan(plan_of(tmp_path / "a.jsonl"), policy)
    assert [row[2:] for row in found] == [(1, "a.jsonl#1", b"before"), (3, "x", b"after")]
    assert policy.skips.to_json() == {reason: {"count": 1, "bytes": len(line)}}


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_bad_rows_of_columns(tmp_path: Path, form: str) -> None:
    texts = [b"good", b"bad \xff", None, "gut é".encode(), b"\xed\xa0\x80", b"last"]
    ids = [b"1", b"2", b"3", b"", None, b"\xfe"]
    table = pa.table({"text": pa.array(texts, pa.binary()), "id": pa.array(ids, pa.binary())})
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(table, path, row_group_size=4)
    else:
        write_arrow(path, table, stream=False)
    with pytest.raises(InputError, match=r"row 2: its 'text' is no UTF-8 \(byte 5\); mend or remove the row"):
        read_source(path)
    policy = skipping()
    found = read_plan(plan_of(path), policy)
    assert [row[2:] for row in found] == [(1, "1", b"good"), (4, f"a.{form}#4", "gut é".encode())]
    assert policy.skips.to_json() == {
        "no UTF-8": {"count": 3, "bytes": 5 + 3 + 4},
        "no text": {"count": 1, "bytes": 0},
    }


def test_strings_that_claim_to_be_utf8_are_checked(tmp_path: Path) -> None:
    """A writer may put anything into a column of strings; Arrow does not look when it reads."""
    bad = pa.array([b"good", b"\xc3("], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    write_arrow(tmp_path / "b.arrow", pa.table({"text": bad}), stream=True)
    for name in ("a.parquet", "b.arrow"):
        policy = skipping()
        assert [row[4] for row in read_plan(plan_of(tmp_path / name), policy)] == [b"good"]
        assert policy.skips["no UTF-8"].count == 1


def test_row_numbers_do_not_depend_on_units(tmp_path: Path) -> None:
    texts = [None if row % 7 == 3 else str(row) for row in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=6)
    wanted = [("a.parquet", row + 1, text) for row, text in enumerate(texts) if text is not None]
    for shard_bytes in (1, 10, 1 << 20):
        found = read_plan(plan_of(tmp_path / "a.parquet", shard_bytes=shard_bytes), skipping())
        assert [(row[1], row[2], row[4].decode()) for row in found] == wanted


def test_damaged_row_group_loses_only_its_unit(tmp_path: Path) -> None:
    texts = [str(row) * 50 for row in range(40)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": texts}),
        path,
        row_group_size=10,
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )
    metadata = pq.read_metadata(path)
    chunk = metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet: is a damaged or truncated Parquet file"):
        read_source(path, shard_bytes=1)
    plan, policy = plan_of(path, shard_bytes=1), skipping()
    assert [row[2] for row in read_plan(plan, policy)] == [*range(1, 11), *range(21, 41)]
    assert policy.skips.to_json() == {"damaged file": {"count": 1, "bytes": plan.tasks[1].weight}}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_column_mistakes_name_the_columns_there_are(tmp_path: Path, name: str) -> None:
    table = pa.table({"body": ["b"], "number": [1], "id": [[1]]})
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        write_arrow(tmp_path / name, table, stream=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, r"has no column 'text' \(it has 'body', 'number', 'id'\); name the one that holds the text"),
        ({"text_column": "number"}, "column 'number' has type int64, text must be strings"),
        ({"text_column": "body"}, "column 'id' has type list.*an id must be a string or an integer"),
    ]
    for options, message in cases:
        for policy in (ErrorPolicy(), skipping()):
            with pytest.raises(ColumnError, match=message):
                read_plan(plan_of(tmp_path / name, skip=policy.on_error is OnError.SKIP, **options), policy)
    assert [row[3:] for row in read_source(tmp_path / name, text_column="body", id_column="number")] == [("1", b"b")]
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    if name.endswith("parquet"):
        pq.write_table(twice, tmp_path / name)
    else:
        write_arrow(tmp_path / name, twice, stream=False)
    with pytest.raises(SetupError, match="has 2 columns 'text'; rename all but one"):
        read_source(tmp_path / name)


def test_nested_keys_and_keys_with_dots(tmp_path: Path) -> None:
    records = [
        {"doc": {"body": "a"}, "metadata": {"WARC-Record-ID": "<urn:1>"}},
        {"doc.body": "b", "doc": {"body": "not this"}, "metadata": {"WARC-Record-ID": 5}},
        {"doc": {"body": "c"}, "metadata": "none"},
        {"doc": {"body": "d"}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = read_source(tmp_path / "a.jsonl", text_column="doc.body", id_column="metadata.WARC-Record-ID")
    assert [row[3:] for row in found] == [("<urn:1>", b"a"), ("5", b"b"), ("a.jsonl#3", b"c"), ("a.jsonl#4", b"d")]


def test_text_and_python_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfline\r\n\0")
    (tmp_path / "b.txt").write_bytes(b"ok\nbad \xff")
    write_compressed(tmp_path / "c.txt.gz", "ü".encode())
    with pytest.raises(InputError, match=r"b\.txt: line 2 is no UTF-8 \(byte 8 of the file\)"):
        read_source(tmp_path)
    policy = skipping()
    found = read_plan(plan_of(tmp_path), policy)
    assert [row[1:] for row in found] == [
        ("a.txt", 1, "a.txt", b"\xef\xbb\xbfline\r\n\0"),
        ("c.txt.gz", 1, "c.txt.gz", "ü".encode()),
    ]
    assert policy.skips.to_json() == {"no UTF-8": {"count": 1, "bytes": 8}}
    (tmp_path / "x.py").write_bytes(b"# coding: latin-1\n'\xe9'\n")
    (tmp_path / "y.py").write_bytes(b"'\xe9'\n")
    # That there is nothing to decode a source by is no damage: it is counted, whatever the policy.
    policy = ErrorPolicy()
    found = read_plan(plan_of(str(tmp_path / "?.py"), format="python"), policy)
    assert [row[3:] for row in found] == [("x.py", "# coding: latin-1\n'é'\n".encode())]
    assert policy.skips.to_json() == {UNDECODABLE: {"count": 1, "bytes": 4}}


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf\n \r\n")
    (tmp_path / "c.txt").write_bytes(b"")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    write_arrow(tmp_path / "e.arrow", pa.table({"text": pa.array([], pa.string())}), stream=True)
    found: list[Found] = read_source(tmp_path)
    assert [row[1:] for row in found] == [("c.txt", 1, "c.txt", b"")]
