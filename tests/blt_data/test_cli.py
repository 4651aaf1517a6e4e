"""The command line as users meet it: bad input is one clear sentence, and nothing that looks whole is left."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from blt_data import ShardKind, write_manifest, write_shard
from blt_data.cli import main
from blt_data.inspection import escape_bytes
from blt_data.shards import Manifest

from .corpora import json_lines, read_documents, write_compressed, write_parquet

BLT_DATA = [sys.executable, "-m", "blt_data.cli"]


def blt_data(
    *arguments: str | Path, env: dict[str, str] | None = None, preexec_fn: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [*BLT_DATA, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, preexec_fn=preexec_fn)


def truncated_parquet(folder: Path) -> None:
    write_parquet(folder / "bad.parquet", ["text"] * 100)
    os.truncate(folder / "bad.parquet", 500)


def parquet_with_damaged_page(folder: Path) -> None:
    write_parquet(folder / "bad.parquet", [f"{n} text" * 50 for n in range(100)], group=100)
    data = bytearray((folder / "bad.parquet").read_bytes())
    data[40:140] = bytes(100)
    (folder / "bad.parquet").write_bytes(data)


def parquet_with_page_that_fails_its_checksum(folder: Path) -> None:
    # Uncompressed text: nothing but the checksum tells that a letter is another.
    table = pa.table({"text": ["a letter"]})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, folder / "bad.parquet", write_page_checksum=True, **options)
    data = (folder / "bad.parquet").read_bytes()
    (folder / "bad.parquet").write_bytes(data.replace(b"a letter", b"a lether", 1))


def parquet_without_text_column(folder: Path) -> None:
    pq.write_table(pa.table({"body": ["b"], "url": ["u"]}), folder / "bad.parquet")


def parquet_with_numbers(folder: Path) -> None:
    pq.write_table(pa.table({"text": [1]}), folder / "bad.parquet")


def parquet_with_null(folder: Path) -> None:
    write_parquet(folder / "bad.parquet", ["a", "b", "c", "d", "e", None, "g"], group=3)


def parquet_with_invalid_utf8(folder: Path) -> None:
    values = pa.array([b"fine", b"also", b"caf\xe9 au lait"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), folder / "bad.parquet", row_group_size=2)


def parquet_with_float_ids(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "id": [0.5]}), folder / "bad.parquet")


def line(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_compressed(folder / name, data)

    return write


def truncated(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        lines = json_lines([f"{index} {os.urandom(20).hex()}" for index in range(2000)])
        write_compressed(folder / name, lines)
        os.truncate(folder / name, (folder / name).stat().st_size - 5000)

    return write


def no_bytes(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).touch()

    return write


def empty_directory(folder: Path) -> None:
    (folder / "notes.docx").write_bytes(b"")


GOOD = b'{"text": "good"}\n\n'
BAD_SOURCES: list[tuple[Callable[[Path], None], str]] = [
    (truncated_parquet, r"bad\.parquet: is a damaged or truncated Parquet file \(.*\); fetch or write it again"),
    (parquet_with_damaged_page, r"bad\.parquet: is a damaged or truncated Parquet file"),
    (parquet_without_text_column, r"bad\.parquet: has no column 'text' \(it has 'body', 'url'\); name .*--text-column"),
    (parquet_with_numbers, r"bad\.parquet: column 'text' has type int64, text must be strings"),
    (parquet_with_null, r"bad\.parquet: row 6 has no text \('text' is null\)"),
    (parquet_with_invalid_utf8, r"bad\.parquet: row 3: its 'text' is no UTF-8 \(byte 4\)"),
    (parquet_with_float_ids, r"bad\.parquet: column 'id' has type double"),
    (line("bad.jsonl", GOOD + b"no json"), r"bad\.jsonl: line 3 is no JSON \(.*\); mend or remove the line"),
    (line("bad.jsonl.gz", GOOD + b'{"text": "cut'), r"bad\.jsonl\.gz: line 3 is no JSON"),
    (line("bad.jsonl", GOOD + b"[1]"), r"bad\.jsonl: line 3 is a list, not a JSON object"),
    (line("bad.jsonl", GOOD + b'{"body": "b"}'), r"bad\.jsonl: line 3 has no text: no 'text' among its keys 'body'"),
    (line("bad.jsonl", GOOD + b'{"text": null}'), r"bad\.jsonl: line 3 has no text: 'text' is null, not a string"),
    (line("bad.jsonl", GOOD + b'{"text": 5}'), r"bad\.jsonl: line 3 has no text: 'text' is a number"),
    (line("bad.jsonl", GOOD + b'{"text": "a", "id": []}'), r"bad\.jsonl: line 3 has an unusable id: 'id' is a list"),
    (line("bad.jsonl", GOOD + b'{"text": "\xff"}'), r"bad\.jsonl: line 3 is no UTF-8 \(byte 11 of the line\)"),
    (line("bad.jsonl", GOOD + b'{"text": "\\ud83d"}'), r"bad\.jsonl: line 3 has a lone surrogate \(\\ud83d\)"),
    (line("bad.jsonl", b"[" * 200_000), r"bad\.jsonl: line 1 is no JSON"),
    (line("bad.txt", b"one\ntwo \xe9\n"), r"bad\.txt: line 2 is no UTF-8 \(byte 9 of the file\); convert .* iconv"),
    (truncated("bad.jsonl.gz"), r"bad\.jsonl\.gz: is a damaged or truncated gzip file"),
    (truncated("bad.jsonl.zst"), r"bad\.jsonl\.zst: is a damaged or truncated zstd file"),
    (line("bad.jsonl", GOOD + b'{"text": 1,}'), r"bad\.jsonl: line 3 is no JSON \(.* at character 1[12]\)"),
    (line("bad.jsonl", GOOD + b'{"text": ' + b"9" * 5000 + b"}"), r"bad\.jsonl: line 3 is no JSON \(Exceeds the limit"),
    (parquet_with_page_that_fails_its_checksum, r"bad\.parquet: is a damaged or truncated Parquet file"),
    (no_bytes("bad.jsonl.gz"), r"bad\.jsonl\.gz: is a damaged or truncated gzip file \(it is empty\)"),
    (no_bytes("bad.txt.zst"), r"bad\.txt\.zst: is a damaged or truncated zstd file \(it is empty\)"),
    (empty_directory, r"in: holds 1 files, none of them Parquet .* or text"),
]


def check_refusal(result: Result | subprocess.CompletedProcess[str], code: int, message: str, output: Path) -> None:
    assert code == 1
    assert "Traceback" not in result.stderr
    [sentence] = [text for text in result.stderr.splitlines() if not text.startswith(("reading ", "all else is done"))]
    assert re.search(f"^error: .*{message}", sentence)
    assert not (output / "manifest.json").exists()


@pytest.mark.parametrize(("write", "message"), BAD_SOURCES)
def test_bad_source(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    """Through click within this process; the next test drives the same through real processes."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    output = tmp_path / "out"
    result = CliRunner().invoke(main, ["prepare", "--source", str(tmp_path / "in"), "--output", str(output)])
    check_refusal(result, result.exit_code, message, output)
    assert not output.exists()


@pytest.mark.parametrize("index", [1, 7])
def test_bad_source_in_a_real_process_with_workers(tmp_path: Path, index: int) -> None:
    write, message = BAD_SOURCES[index]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    write_parquet(tmp_path / "in" / "a.parquet", ["good"] * 10, group=2)
    output = tmp_path / "out"
    result = blt_data(
        "prepare", "--source", tmp_path / "in", "--output", output, "--workers", "2", "--shard-size", "10"
    )
    check_refusal(result, result.returncode, message, output)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "absent: no such file or directory; name one, or a quoted glob, python-stdlib, fineweb-edu"),
        ("*.parquet", "no such file or directory and no file that matches"),
        ("/dev/null", "is no regular file"),
        ("", "the source is an empty text; name a file"),
    ],
)
def test_missing_source(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / source if source else ""
    result = blt_data("prepare", "--source", path, "--output", tmp_path / "out")
    check_refusal(result, result.returncode, message, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    (tmp_path / "out").write_text("mine")
    result = blt_data("prepare", "--source", tmp_path / "a.parquet", "--output", tmp_path / "out")
    check_refusal(result, result.returncode, "out", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files fails writing half-way, as a full disk does."""
    write_parquet(tmp_path / "a.parquet", ["x" * 100_000] * 8, group=4)

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    arguments = ("prepare", "--source", tmp_path / "a.parquet", "--output", tmp_path / "out", "--shard-size", "400kB")
    result = blt_data(*arguments, "--workers", "2", preexec_fn=limit_file_size)
    check_refusal(result, result.returncode, r"File too large; free some space and run", tmp_path / "out")
    assert blt_data(*arguments).returncode == 0
    assert len(read_documents(tmp_path / "out")) == 8


def obey_permissions() -> None:
    """Give up root's right to ignore them, in the program that this process is about to become."""
    drop_capability_from_bounding_set = 24
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(drop_capability_from_bounding_set, capability)


def test_permissions(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    (tmp_path / "shut").mkdir(mode=0o555)
    if not run_obeying(["touch", str(tmp_path / "shut" / "probe")]).returncode:
        pytest.skip("permissions bind nobody here")
    result = run_obeying(
        [*BLT_DATA, "prepare", "--source", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "shut")]
    )
    check_refusal(
        result, result.returncode, r"shut/\.work: Permission denied; check its permissions", tmp_path / "shut"
    )
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    output = tmp_path / "out"
    result = run_obeying([*BLT_DATA, "prepare", "--source", str(tmp_path / "a.txt"), "--output", str(output)])
    check_refusal(result, result.returncode, r"a\.txt: Permission denied", output)


def run_obeying(command: list[str]) -> subprocess.CompletedProcess[str]:
    drop = obey_permissions if os.geteuid() == 0 else None
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=drop)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--limit-bytes", "many"),
        ("--limit-bytes", "0"),
        ("--holdout-fraction", "1"),
        ("--workers", "0"),
        ("--shard-size", "-1"),
    ],
)
def test_misspelt_options(tmp_path: Path, option: str, value: str) -> None:
    result = CliRunner().invoke(main, ["prepare", "--source", "x", "--output", str(tmp_path), option, value])
    assert result.exit_code == 2
    assert option in result.stderr


@pytest.mark.parametrize(("size", "taken"), [("12", 3), ("0.01kB", 2), ("1 KiB", 4), ("1m", 4)])
def test_sizes(tmp_path: Path, size: str, taken: int) -> None:
    write_parquet(tmp_path / "a.parquet", ["abcd"] * 4)
    arguments = ["prepare", "--source", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(main, [*arguments, "--limit-bytes", size]).exit_code == 0
    assert len(read_documents(tmp_path / "out")) == taken


def test_prepare_verify_inspect(tmp_path: Path) -> None:
    texts = ["plain", "tab\tand\0NUL", "naïve ☃ " * 20]
    write_parquet(tmp_path / "a.parquet", texts * 50, ids=[f"doc-{index}" for index in range(150)], group=10)
    arguments = ("--source", tmp_path / "a.parquet", "--output", tmp_path / "out", "--holdout-fraction", "0.2")
    done = blt_data("prepare", *arguments)
    assert (done.returncode, done.stderr) == (0, f"reading 1 file, {parquet_text_bytes(tmp_path / 'a.parquet')}\n")
    assert "train" in done.stdout
    assert "holdout" in done.stdout
    again = blt_data("prepare", *arguments)
    assert (again.returncode, again.stderr) == (0, "already complete, nothing to do\n")
    verified = blt_data("verify", tmp_path / "out")
    assert (verified.returncode, len(re.findall(r"(train|holdout) .* right ", verified.stdout))) == (0, 2)
    shown = blt_data("inspect", tmp_path / "out", "--documents", "4")
    assert shown.returncode == 0
    for text in ("shard-00000.arrow", "options.holdout_fraction", "tab\\tand\\x00NUL", "naïve ☃ ", "(a.parquet, "):
        assert text in shown.stdout


def parquet_text_bytes(path: Path) -> str:
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return f"{sum(group.column(0).total_uncompressed_size for group in groups) / 1000:.1f} kB"


def test_inspect_and_verify_patched_shards_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    entry = write_shard(
        tmp_path / "shard-00000.arrow",
        kind=ShardKind.PATCHED,
        document_ids=["a"],
        contents=[b"\xff\x00ok"],
        sources=["s"],
        patch_lengths=pa.array([[1, 5]], pa.list_(pa.uint16())),
        provenance={"scheme": {"name": "static"}},
    )
    write_manifest(tmp_path, Manifest(kind=ShardKind.PATCHED, shards=(entry,), provenance={}))
    runner = CliRunner()
    shown = runner.invoke(main, ["inspect", str(tmp_path)])
    assert shown.exit_code == 0
    assert "\\xff\\x00ok" in shown.stdout
    assert "mean patch" in shown.stdout
    assert re.search(r"patched +│ +1 │ .* right ", runner.invoke(main, ["verify", str(tmp_path)]).stdout)
    path = tmp_path / "shard-00000.arrow"
    path.write_bytes(path.read_bytes().replace(b"\xff\x00ok", b"\xff\x00no"))
    damaged = runner.invoke(main, ["inspect", str(tmp_path)])
    assert damaged.exit_code == 1
    assert "shard-00000.arrow: does not have the checksum" in damaged.stderr


@given(data=st.binary())
def test_shown_bytes_are_printable_and_can_be_told_apart(data: bytes) -> None:
    shown = escape_bytes(data)
    assert shown.isprintable()
    if shown.isascii() and "\\" not in shown:
        assert shown.encode() == data


def test_verify_names_every_damaged_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["abcdefgh"] * 30, group=10)
    output = tmp_path / "out"
    blt_data("prepare", "--source", tmp_path / "a.parquet", "--output", output, "--shard-size", "80")
    for name in ("shard-00000.arrow", "shard-00002.arrow"):
        data = bytearray((output / name).read_bytes())
        data[len(data) // 2] ^= 1
        (output / name).write_bytes(data)
    verified = blt_data("verify", output)
    assert verified.returncode == 1
    assert [line.split(":")[1].strip() for line in verified.stderr.splitlines()] == [
        str(output / "shard-00000.arrow"),
        str(output / "shard-00002.arrow"),
    ]
    assert "Traceback" not in verified.stderr


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_directory_that_is_none(tmp_path: Path, command: str) -> None:
    result = blt_data(command, tmp_path / "absent")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "absent: no such directory" in result.stderr


def test_core_works_without_datatrove(tmp_path: Path) -> None:
    """verify and inspect need the light core only; prepare says what to install."""
    write_parquet(tmp_path / "a.parquet", ["a"])
    blt_data("prepare", "--source", tmp_path / "a.parquet", "--output", tmp_path / "out")
    hidden = tmp_path / "hidden"
    for name in ("datatrove", "orjson", "zstandard", "loguru"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text(f"raise ModuleNotFoundError('No module', name={name!r})")
    environment = os.environ | {"PYTHONPATH": str(hidden)}
    for command in ("verify", "inspect"):
        assert blt_data(command, tmp_path / "out", env=environment).returncode == 0
    arguments = ("--source", tmp_path / "a.parquet", "--output", tmp_path / "new")
    result = blt_data("prepare", *arguments, env=environment)
    check_refusal(result, result.returncode, r"\(datatrove\); pip install 'blt-data\[prepare\]'", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_sources_are_refused_rather_than_one_of_them_dropped(tmp_path: Path) -> None:
    arguments = ["prepare", "--source", "one.txt", "--source", "two.txt", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--source is given 2 times; name several sources in a file for --recipe" in result.output
