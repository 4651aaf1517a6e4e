"""prepare: the documents of every source format arrive byte for byte, whatever the workers, shards and splits."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blt_data import InputError, ShardDirectory
from blt_data.ingest import Listener, PrepareConfig, PrepareResult, PrepareStart, prepare
from blt_data.sample import decode_python
from blt_data.splits import split_of

from .corpora import HARD_TEXTS, files_of, json_lines, read_documents, write_compressed, write_parquet

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="no ../shared with real data")

IDS = [f"id-{index}" for index in range(len(HARD_TEXTS))]
EXPECTED = [(name, text.encode()) for name, text in zip(IDS, HARD_TEXTS, strict=True)]


def run(source: Path | str, output: Path, **options: object) -> PrepareResult:
    """Prepare in source order, in which it is easy to say what must come out; test_shuffle.py has the rest."""
    config = PrepareConfig(source=str(source), output=output, **{"shuffle_seed": None, **options})  # type: ignore[arg-type]
    return prepare(config)


def as_parquet(folder: Path) -> Path:
    write_parquet(folder / "a.parquet", HARD_TEXTS, ids=IDS)
    return folder / "a.parquet"


def as_large_string_parquet(folder: Path) -> Path:
    table = pa.table({"id": IDS, "text": pa.array(HARD_TEXTS, pa.large_string())})
    pq.write_table(table, folder / "a.parquet")
    return folder


def as_dictionary_parquet(folder: Path) -> Path:
    table = pa.table({"id": IDS, "text": pa.array(HARD_TEXTS).dictionary_encode()})
    pq.write_table(table, folder / "a.parquet")
    return folder


def as_binary_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"id": IDS, "text": pa.array([t.encode() for t in HARD_TEXTS])}), folder / "a.parquet")
    return folder


def as_json_lines(name: str, *, ascii_only: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_compressed(folder / name, json_lines(HARD_TEXTS, IDS, ascii_only=ascii_only))
        return folder

    return write


@pytest.mark.parametrize("shard_bytes", [1, 9000, 1 << 30])
@pytest.mark.parametrize(
    "write",
    [
        as_parquet,
        as_large_string_parquet,
        as_dictionary_parquet,
        as_binary_parquet,
        as_json_lines("a.jsonl"),
        as_json_lines("a.jsonl", ascii_only=True),
        as_json_lines("a.json.gz"),
        as_json_lines("a.jsonl.zst"),
        as_json_lines("a.ndjson.zstd"),
    ],
)
def test_every_byte_arrives(tmp_path: Path, write: Callable[[Path], Path], shard_bytes: int) -> None:
    (tmp_path / "in").mkdir()
    result = run(write(tmp_path / "in"), tmp_path / "out", shard_bytes=shard_bytes)
    assert read_documents(tmp_path / "out") == EXPECTED
    assert result.manifests[tmp_path / "out"].bytes == sum(len(content) for _, content in EXPECTED)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    shards = len(names) - 1
    assert names == ["manifest.json", *(f"shard-{index:05d}.arrow" for index in range(shards))]
    assert (shards == 1) is (shard_bytes == 1 << 30)


def test_text_files_arrive_whole_in_order_of_their_paths(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for index, text in enumerate(HARD_TEXTS):
        path = folder / f"d{index % 3}" / f"{index:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    write_compressed(folder / "packed.txt.zst", b"gepackt\r\n")
    (folder / "ignored.bin").write_bytes(b"\xff")
    run(folder, tmp_path / "out", source_name="mine")
    found = read_documents(tmp_path / "out")
    assert found == [
        (str(path.relative_to(folder)), path.read_bytes() if path.suffix == ".txt" else b"gepackt\r\n")
        for path in sorted(folder.rglob("*.[tz]*"), key=lambda path: str(path.relative_to(folder)))
    ]
    directory = ShardDirectory.open(tmp_path / "out")
    assert directory.shard(0).source(0) == "mine"
    assert directory.manifest.skipped["unrecognised file"].count == 1


def test_any_file_named_directly_or_by_a_glob_is_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README").write_bytes(b"read me\r\n")
    (tmp_path / "in" / "b.md").write_bytes(b"# b")
    (tmp_path / "in" / "a.md").write_bytes(b"# a")
    run(tmp_path / "in" / "README", tmp_path / "one")
    assert read_documents(tmp_path / "one") == [("README", b"read me\r\n")]
    run(tmp_path / "in" / "*.md", tmp_path / "two")
    assert read_documents(tmp_path / "two") == [("a.md", b"# a"), ("b.md", b"# b")]
    assert ShardDirectory.open(tmp_path / "two").shard(0).source(1) == "in"


@pytest.mark.parametrize("name", ["big.parquet", "big.jsonl", "big.jsonl.zst", "big.txt"])
def test_fifty_megabyte_document(tmp_path: Path, name: str) -> None:
    pattern = "ein sehr großes Dokument 🐘\n"
    text = pattern * (50_000_000 // len(pattern.encode()))
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(path, ["before", text, "after"])
    elif name.endswith(".txt"):
        path.write_text(text, encoding="utf-8", newline="")
    else:
        write_compressed(path, json_lines(["before", text, "after"]))
    run(path, tmp_path / "out", shard_bytes=1 << 20)
    documents = [text] if name.endswith(".txt") else ["before", text, "after"]
    found = [content for _, content in read_documents(tmp_path / "out")]
    assert [hashlib.sha256(content).digest() for content in found] == [
        hashlib.sha256(document.encode()).digest() for document in documents
    ]
    assert len(ShardDirectory.open(tmp_path / "out")) == len(documents)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    files=st.lists(st.lists(st.text(max_size=30), min_size=1, max_size=6), min_size=1, max_size=4),
    shard_bytes=st.integers(1, 60),
    parquet=st.booleans(),
)
def test_any_text_arrives(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], shard_bytes: int, parquet: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "in").mkdir()
    for index, texts in enumerate(files):
        if parquet:
            write_parquet(folder / "in" / f"{index}.parquet", texts, group=2)
        else:
            (folder / "in" / f"{index}.jsonl").write_bytes(json_lines(texts))
    run(folder / "in", folder / "out", shard_bytes=shard_bytes, workers=1)
    suffix = "parquet" if parquet else "jsonl"
    assert read_documents(folder / "out") == [
        (f"{index}.{suffix}#{row}", text.encode())
        for index, texts in enumerate(files)
        for row, text in enumerate(texts, start=1)
    ]
    for entry in ShardDirectory.open(folder / "out").manifest.shards:
        assert entry.bytes <= shard_bytes or entry.documents == 1


def test_ids_missing_null_empty_integer_and_duplicate(tmp_path: Path) -> None:
    records = [
        {"text": "a"},
        {"text": "b", "id": None},
        {"text": "c", "id": ""},
        {"text": "d", "id": 7},
        {"text": "e", "id": "same"},
        {"text": "f", "id": "same"},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n \n")
    run(tmp_path / "a.jsonl", tmp_path / "json")
    ids = ["a.jsonl#1", "a.jsonl#3", "a.jsonl#5", "7", "same", "same"]
    assert [name for name, _ in read_documents(tmp_path / "json")] == ids
    pq.write_table(pa.table({"text": ["a", "b"], "id": [5, None]}), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "parquet")
    assert [name for name, _ in read_documents(tmp_path / "parquet")] == ["5", "a.parquet#2"]
    pq.write_table(pa.table({"text": ["a"], "id": pa.nulls(1)}), tmp_path / "b.parquet")
    run(tmp_path / "b.parquet", tmp_path / "nulls")
    assert [name for name, _ in read_documents(tmp_path / "nulls")] == ["b.parquet#1"]


def test_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "b", "text": "t", "key": "k"}')
    run(tmp_path / "a.jsonl", tmp_path / "out", text_column="body", id_column="key")
    assert read_documents(tmp_path / "out") == [("k", b"b")]


def test_json_that_the_fast_parser_refuses(tmp_path: Path) -> None:
    """NaN and numbers beyond 64 bits beside the text, and lone surrogates in a key that nobody reads."""
    lines = ['{"text": "a", "score": NaN}', '{"text": "b", "n": 123456789012345678901234567890}']
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join([*lines, '{"text": "c", "url": "\\ud800"}']))
    run(tmp_path / "a.jsonl", tmp_path / "out")
    assert [content for _, content in read_documents(tmp_path / "out")] == [b"a", b"b", b"c"]


def test_compressed_file_of_several_frames(tmp_path: Path) -> None:
    frames = [zstandard.compress(json_lines([text]) + b"\n") for text in "abc"]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    run(tmp_path / "a.jsonl.zst", tmp_path / "out")
    assert [content for _, content in read_documents(tmp_path / "out")] == [b"a", b"b", b"c"]


def mixed_source(folder: Path) -> Path:
    """Return a directory of all formats, about 200 kB, in files of very different sizes."""
    generator = np.random.default_rng(7)
    folder.mkdir()
    for index in range(12):
        texts = [
            "ä" * int(size) + f"{index}/{row}" for row, size in enumerate(generator.integers(0, 900, 1 + index * 2))
        ]
        if index % 3 == 0:
            write_parquet(folder / f"{index:02d}.parquet", texts, group=3)
        elif index % 3 == 1:
            write_compressed(folder / f"{index:02d}.jsonl.zst", json_lines(texts))
        else:
            (folder / f"{index:02d}.txt").write_text(texts[0])
    return folder


def test_output_does_not_depend_on_workers(tmp_path: Path) -> None:
    source = mixed_source(tmp_path / "in")
    for workers in (1, 2, 3):
        run(source, tmp_path / str(workers), workers=workers, shard_bytes=5000, holdout_fraction=0.2)
    files = files_of(tmp_path / "1")
    assert len(files) > 10
    assert files_of(tmp_path / "2") == files
    assert files_of(tmp_path / "3") == files


def test_output_does_not_depend_on_where_it_is_or_how_the_source_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = mixed_source(tmp_path / "in")
    run(source, tmp_path / "deep" / "er" / "a")
    monkeypatch.chdir(tmp_path)
    run("in", tmp_path / "b")
    # The output within the source is no part of it.
    run("in", tmp_path / "in" / "c")
    assert files_of(tmp_path / "deep" / "er" / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "in" / "c")


def test_holdout_is_a_function_of_the_id(tmp_path: Path) -> None:
    ids = [f"document {index}" for index in range(4000)]
    write_parquet(tmp_path / "a.parquet", [name.upper() for name in ids], ids=ids, group=1000)
    run(tmp_path / "a.parquet", tmp_path / "out", holdout_fraction=0.1)
    train, holdout = (dict(read_documents(tmp_path / "out" / split)) for split in ("train", "holdout"))
    assert train.keys() | holdout.keys() == set(ids)
    assert not train.keys() & holdout.keys()
    assert set(holdout) == {name for name in ids if split_of(name, 0.1) == "holdout"}
    # Four standard deviations of the binomial distribution.
    assert abs(len(holdout) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert [name for name in ids if name in train] == list(train)


@given(name=st.text(), fractions=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)))
def test_a_larger_holdout_contains_the_smaller(name: str, fractions: tuple[float, float]) -> None:
    small, large = sorted(fractions)
    assert split_of(name, small) == "train" or split_of(name, large) == "holdout"


@pytest.mark.parametrize("limit", [1, 10, 11, 99, 10_000])
def test_limit_takes_the_first_whole_documents(tmp_path: Path, limit: int) -> None:
    texts = ["a", "", "é" * 5, "b" * 20, "c", "d" * 70]
    write_parquet(tmp_path / "a.parquet", texts[:3], group=1)
    write_parquet(tmp_path / "b.parquet", texts[3:], group=1)
    run(tmp_path / "*.parquet", tmp_path / "out", limit_bytes=limit, workers=3)
    taken: list[bytes] = []
    for text in texts:
        if sum(len(content) for content in taken) + len(text.encode()) > limit:
            break
        taken.append(text.encode())
    assert [content for _, content in read_documents(tmp_path / "out")] == taken


def test_limit_below_the_first_document_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["long enough"])
    with pytest.raises(InputError, match=r"the first document, 'a.parquet#1', has 11 bytes.*raise the limit"):
        run(tmp_path / "a.parquet", tmp_path / "out", limit_bytes=5)
    assert not (tmp_path / "out").exists()


def test_standard_library(tmp_path: Path) -> None:
    run("python-stdlib", tmp_path / "out", limit_bytes=3_000_000)
    documents = read_documents(tmp_path / "out")
    root = Path(sysconfig.get_path("stdlib"))
    assert "argparse.py" in dict(documents)
    assert [name for name, _ in documents] == sorted(name for name, _ in documents)
    for name, content in documents:
        assert content == (root / name).read_bytes()
        assert not {"site-packages", "test", "tests"} & set(Path(name).parts)
    assert 2_500_000 < sum(len(content) for _, content in documents) <= 3_000_000


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x = '\xc3\xa9'\r\n", "x = 'é'\r\n"),
        (b"\xef\xbb\xbfx = 1\n", "\ufeffx = 1\n"),
        (b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", "# -*- coding: latin-1 -*-\nx = 'é'\n"),
        (b"x = '\xe9'\n", None),
        (b"# coding: no-such-encoding\n", None),
    ],
)
def test_python_sources_are_decoded_by_their_cookie(data: bytes, text: str | None) -> None:
    assert decode_python(data) == text


def test_complete_output_is_left_alone_or_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", "b"])
    first = run(tmp_path / "a.parquet", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = run(tmp_path / "a.parquet", tmp_path / "out", workers=2)
    assert (first.already_complete, again.already_complete) == (False, True)
    assert again.manifests == first.manifests
    with pytest.raises(InputError, match=r"already complete with other parameters.*shard_bytes is 67108864 there, 5"):
        run(tmp_path / "a.parquet", tmp_path / "out", shard_bytes=5)
    with pytest.raises(InputError, match=r"holdout_fraction is not given there, 0\.5 here"):
        run(tmp_path / "a.parquet", tmp_path / "out", holdout_fraction=0.5)
    write_parquet(tmp_path / "a.parquet", ["a", "b", "more"])
    with pytest.raises(InputError, match="listing_sha256"):
        run(tmp_path / "a.parquet", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_foreign_directory_is_refused_untouched(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no unfinished run"):
        run(tmp_path / "a.parquet", tmp_path / "out")
    assert files_of(tmp_path / "out") == {"thesis.tex": b"precious"}


@pytest.mark.parametrize(("texts", "message"), [([], "holds no documents"), (["a"], "falls to the split")])
def test_empty_splits_are_refused(tmp_path: Path, texts: Sequence[str], message: str) -> None:
    write_parquet(tmp_path / "a.parquet", texts)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "a.parquet", tmp_path / "out", holdout_fraction=0.5)


def test_mended_source_takes_over_the_tasks_that_were_good(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.jsonl").write_bytes(json_lines([str(index) * 1000]))
    (folder / "4.jsonl").write_text('{"text": broken')
    with pytest.raises(InputError, match=r"4\.jsonl: line 1 is no JSON"):
        run(folder, tmp_path / "out", shard_bytes=500, workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    (folder / "4.jsonl").write_bytes(json_lines(["mended"]))
    # A file of the same size but changed since is read again.
    (folder / "1.jsonl").write_bytes(json_lines(["x" * 1000]))
    os.utime(folder / "1.jsonl", ns=(1, 1))
    starts: list[PrepareStart] = []
    prepare(
        PrepareConfig(source=str(folder), output=tmp_path / "out", shard_bytes=500, shuffle_seed=None),
        listener=Listener(on_start=starts.append),
    )
    # The tasks of the two files that have not changed.
    assert [start.tasks_resumed for start in starts] == [2]
    assert [content[:6] for _, content in read_documents(tmp_path / "out")] == [
        b"000000",
        b"xxxxxx",
        b"222222",
        b"333333",
        b"mended",
    ]
    run(folder, tmp_path / "fresh", shard_bytes=500)
    assert files_of(tmp_path / "fresh") == files_of(tmp_path / "out")


def test_memory_stays_below_its_limit(tmp_path: Path) -> None:
    """All processes together, page cache not counted; tools/bench/prepare.py has the corpus of ten times the limit."""
    line = json_lines(["wörter " * 2000]) + b"\n"
    write_compressed(tmp_path / "a.jsonl.zst", line * 12_000)
    command = [sys.executable, "-m", "blt_data.cli", "prepare", "--shard-size", "8MB", "--memory-limit", "190MB"]
    command += ["--source", str(tmp_path / "a.jsonl.zst"), "--output", str(tmp_path / "out"), "--workers", "3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        with suppress(psutil.Error):
            peak = max(peak, sum(one.memory_full_info().pss for one in (root, *root.children(recursive=True))))
        time.sleep(0.02)
    assert process.returncode == 0
    # The text alone has 192 MB.
    assert ShardDirectory.open(tmp_path / "out").manifest.bytes == 16_000 * 12_000
    assert 50_000_000 < peak < 190_000_000


@needs_shared
def test_parquet_text_arrives_like_pyarrow_reads_it(tmp_path: Path) -> None:
    source = SHARED / "fineweb-edu-sample"
    run(source, tmp_path / "out", shard_bytes=3_000_000, workers=1)
    expected = []
    for path in sorted(source.rglob("*.parquet")):
        table = pq.read_table(path, columns=["id", "text"])
        expected += list(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert read_documents(tmp_path / "out") == [(name, text.encode()) for name, text in expected]


@needs_shared
def test_multilingual_lines_arrive_like_the_standard_library_reads_them(tmp_path: Path) -> None:
    source = SHARED / "multilingual"
    run(source, tmp_path / "out", workers=1)
    expected = []
    for path in sorted(source.rglob("*.zst")):
        with path.open("rb") as raw:
            lines = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read().split(b"\n")
        expected += [json.loads(line)["text"].encode() for line in lines if line]
    assert [content for _, content in read_documents(tmp_path / "out")] == expected
