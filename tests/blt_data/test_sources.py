"""Naming sources: on this machine, by short names, and behind any URL."""

from __future__ import annotations

import glob
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blt_data import InputError
from blt_data.errors import SetupError
from blt_data.skips import ErrorPolicy, OnError
from blt_data.sources import Format, Source, open_file, remote, resolve_source, retrying
from blt_data.sources.globs import compile_glob, fixed_prefix
from blt_data.sources.names import COLLECTIONS, collection_of
from blt_data.sources.retrying import ATTEMPTS, ByteStream, RemoteError, RetryingFile

from .corpora import HARD_TEXTS, json_lines, write_parquet
from .reading import plan_of, read_plan, read_source


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.001)


class Unsteady(MemoryFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """Memory behind a bad line: a real fsspec file system whose reads fail when told to."""

    protocol = "unsteady"
    root_marker = ""
    store: dict[str, Any] = {}  # noqa: RUF012  # fsspec's own way
    pseudo_dirs = [""]  # noqa: RUF012
    failures: list[Exception] = []  # noqa: RUF012
    opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("unsteady://", "memory://")))

    def _open(self, path: str, *args: Any, **options: Any) -> Any:
        type(self).opened += 1
        file = super()._open(path, *args, **options)
        if options.get("mode", args[0] if args else "rb") != "rb" or not self.failures:
            return file
        read = file.read

        def failing(size: int = -1) -> bytes:
            if self.failures:
                raise self.failures.pop(0)
            return bytes(read(min(size, 1000)))

        file.read = failing
        return file


@pytest.fixture
def unsteady() -> Iterator[type[Unsteady]]:
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    Unsteady.store.clear()
    Unsteady.failures, Unsteady.opened = [], 0
    yield Unsteady
    Unsteady.store.clear()


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


def names_of(source: Source) -> list[str]:
    return [file.relative for file in source.files]


def test_what_is_here_comes_before_a_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "fineweb-edu" / "sample" / "10BT"
    folder.mkdir(parents=True)
    write_parquet(folder / "000_00000.parquet", ["here"])
    for source in ("fineweb-edu", "fineweb-edu/sample/10BT", "fineweb-edu/sample/10BT/*.parquet"):
        assert [row[4] for row in read_source(source)] == [b"here"]
    with pytest.raises(InputError, match="--revision main is for datasets on the hub"):
        resolve_source("fineweb-edu", revision="main")


def test_short_names_mean_the_hubs_layout() -> None:
    patterns = {
        source: collection_of(source) for source in ("fineweb", "fineweb/sample-350BT", "fineweb/CC-MAIN-2013-20")
    }
    found = {source: (value[0].dataset, value[1]) for source, value in patterns.items() if value}
    assert found == {
        "fineweb": ("HuggingFaceFW/fineweb", "data/*/*.parquet"),
        "fineweb/sample-350BT": ("HuggingFaceFW/fineweb", "sample/350BT/*.parquet"),
        "fineweb/CC-MAIN-2013-20": ("HuggingFaceFW/fineweb", "data/CC-MAIN-2013-20/*.parquet"),
    }
    assert collection_of("web") is None
    for name, collection in COLLECTIONS.items():
        for config in collection.configs:
            assert collection_of(f"{name}/{config}") is not None


PARTS = ["a", "b", "ab", "a.b", "[", "x-y", "é"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pattern=st.lists(
        st.sampled_from(["*", "**", "?", "a*", "*b", "[ab]", "[!a]", "[[]", "a.b", "[a-b]?", "x-y", "[é]"]),
        min_size=1,
        max_size=4,
    )
)
def test_globs_mean_what_the_shell_means(tmp_path: Path, pattern: list[str]) -> None:
    for first in PARTS:
        for second in PARTS:
            (tmp_path / first / second).mkdir(parents=True, exist_ok=True)
            for third in ("a", "b.a", "["):
                (tmp_path / first / second / third).touch()
        (tmp_path / first / "ab!").touch()
    text = "/".join(pattern)
    here = [path for path in glob.glob(text, root_dir=tmp_path, recursive=True) if (tmp_path / path).is_file()]
    every = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    matches = compile_glob(text)
    assert sorted(path for path in every if matches.fullmatch(path)) == sorted(set(here))
    prefix = fixed_prefix(text)
    assert all(path.startswith(f"{prefix}/") for path in here if prefix)


def test_format_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(json_lines(["a"]))
    (tmp_path / "b.data").write_bytes(json_lines(["b"]))
    assert [row[4] for row in read_source(tmp_path, format=Format.JSON_LINES)] == [b"a", b"b"]
    assert [row[4] for row in read_source(tmp_path / "?.data", format=Format.JSON_LINES)] == [b"a", b"b"]
    assert [row[4] for row in read_source(tmp_path / "a.data")] == [json_lines(["a"])]
    for name in ("a.parquet.gz", "a.arrow.zst"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match="decompress it first"):
            resolve_source(str(tmp_path / name))


def test_urls_of_files_are_paths(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    write_parquet(folder / "a.parquet", HARD_TEXTS)
    by_path, by_url = (plan_of(str(folder)), plan_of("file://" + str(folder).replace(" ", "%20")))
    assert by_path == by_url
    with pytest.raises(InputError, match=r"file:///no/where: no such file or directory"):
        resolve_source("file:///no/where")


def test_files_behind_any_url(unsteady: type[Unsteady], tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", HARD_TEXTS, ids=[f"id {index}" for index in range(len(HARD_TEXTS))])
    put("unsteady://bucket/x/a.parquet", (tmp_path / "a.parquet").read_bytes())
    put("unsteady://bucket/x/deep/b.jsonl", json_lines(HARD_TEXTS))
    put("unsteady://bucket/x/README", b"read me")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_bytes(json_lines(HARD_TEXTS))
    (tmp_path / "README").write_bytes(b"read me")
    local, there = plan_of(tmp_path), plan_of("unsteady://bucket/x")
    assert [row[1:] for row in read_plan(there)] == [row[1:] for row in read_plan(local)]
    assert there.skipped == local.skipped
    assert there.sources[0].provenance()["url"] == "unsteady://bucket/x"
    assert names_of(resolve_source("unsteady://bucket/**/*.jsonl")) == ["x/deep/b.jsonl"]
    assert names_of(resolve_source("unsteady://bucket/x/README")) == ["README"]
    assert resolve_source("unsteady://bucket/x").name == "x"


def test_urls_of_other_kinds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/a.jsonl", json_lines(["zipped"]))
        archive.writestr("x/b.txt", "text")
    chained = f"zip://x::file://{tmp_path / 'a.zip'}"
    assert [row[4] for row in read_source(chained)] == [b"zipped", b"text"]
    assert remote._around("sftp://me@host/data/x/", "/data/x") == ("sftp://me@host", "")
    assert remote._around("s3://bucket/x", "bucket/x") == ("s3://", "")


def test_version_tells_a_changed_file(unsteady: type[Unsteady]) -> None:
    put("unsteady://bucket/a.jsonl", json_lines(["a"]))
    first = plan_of("unsteady://bucket/a.jsonl")
    assert plan_of("unsteady://bucket/a.jsonl") == first
    put("unsteady://bucket/a.jsonl", json_lines(["b"]))
    assert plan_of("unsteady://bucket/a.jsonl").tasks[0].key != first.tasks[0].key
    put("unsteady://bucket/a.jsonl", json_lines(["longer"]))
    with pytest.raises(InputError, match=r"a.jsonl: has [\d,]+ bytes where it had [\d,]+ when it was listed"):
        read_plan(first)


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionResetError(), OSError(5, "gone"), RuntimeError("?")])
def test_reading_goes_on_after_a_failure(unsteady: type[Unsteady], error: Exception) -> None:
    put("unsteady://bucket/a.jsonl", json_lines(HARD_TEXTS))
    plan = plan_of("unsteady://bucket/a.jsonl")
    unsteady.failures = [error] * (ATTEMPTS - 1)
    assert [row[4].decode() for row in read_plan(plan)] == HARD_TEXTS
    unsteady.failures = [error] * 10 * ATTEMPTS
    for policy in (ErrorPolicy(), ErrorPolicy(OnError.SKIP)):
        with pytest.raises(RemoteError, match=r"unsteady://bucket/a\.jsonl: could not be read") as caught:
            read_plan(plan, policy)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("bucket/a.jsonl"), "there is no such file or directory"),
        (PermissionError("Access Denied"), r"may not be read \(Access Denied\); set the credentials"),
        (ValueError("bad bucket"), r"cannot be read \(bad bucket\); check the URL"),
    ],
)
def test_refusals_are_not_tried_again(unsteady: type[Unsteady], error: Exception, message: str) -> None:
    put("unsteady://bucket/a.jsonl", json_lines(HARD_TEXTS))
    plan = plan_of("unsteady://bucket/a.jsonl")
    unsteady.failures, unsteady.opened = [error], 0
    with pytest.raises(SetupError, match=message):
        read_plan(plan, ErrorPolicy(OnError.SKIP))
    assert unsteady.opened == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here", "there is no such file or directory"),
        ("memory://nothing/*.jsonl", "no file matches this glob"),
        ("nonsense://bucket/x", "nonsense:// is no kind of URL that fsspec knows"),
        ("oci://bucket/x", "oci:// needs a package that is not installed; pip install ocifs"),
        ("", "the source is an empty text"),
    ],
)
def test_mistakes_are_told_in_one_sentence(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        resolve_source(url)
    assert "\n" not in str(caught.value)


def test_password_in_a_url_is_not_shown(unsteady: type[Unsteady]) -> None:
    with pytest.raises(InputError) as caught:
        resolve_source("oci://user:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)
    assert "oci://***@bucket/x" in str(caught.value)


class Chunks(ByteStream):
    """A stream that fails now and then and gives as much as it likes."""

    def __init__(self, data: bytes, position: int, sizes: Iterator[int]) -> None:
        self.data, self.position, self.sizes = data, position, sizes

    def read(self, size: int, /) -> bytes:
        limit = next(self.sizes)
        if limit < 0:
            raise ConnectionError
        piece = self.data[self.position : self.position + min(size, limit)]
        self.position += len(piece)
        return piece

    def skip_to(self, position: int, /) -> bool:
        if position < self.position or position > self.position + 3:
            return False
        self.position = position
        return True

    def close(self) -> None:
        self.position = -1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60),
    tail=st.integers(0, 70),
    sizes=st.lists(st.integers(-1, 9), max_size=60),
    moves=st.lists(st.tuples(st.sampled_from(["read", "set", "cur", "end"]), st.integers(-20, 70)), max_size=12),
)
def test_a_file_over_a_bad_line_is_a_file(
    monkeypatch: pytest.MonkeyPatch, data: bytes, tail: int, sizes: list[int], moves: list[tuple[str, int]]
) -> None:
    """Against a file on the disk, whatever is read and wherever the connection breaks."""
    monkeypatch.setattr(retrying, "TAIL_BYTES", tail)
    monkeypatch.setattr(retrying, "ATTEMPTS", 10**6)
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.0)

    def supply() -> Iterator[int]:
        yield from sizes
        while True:
            yield 7

    supplied = supply()
    file = RetryingFile("there", len(data), lambda position: Chunks(data, position, supplied))
    with file:
        position = 0
        for move, amount in moves:
            if move == "read":
                wanted = data[position:] if amount < 0 else data[position : position + amount]
                assert file.read(amount) == wanted
                position += len(wanted)
            else:
                base = {"set": 0, "cur": position, "end": len(data)}[move]
                position = max(0, base + amount)
                assert file.seek(amount, ["set", "cur", "end"].index(move)) == position
            assert file.tell() == position


def test_open_file_reads_what_was_listed(unsteady: type[Unsteady], tmp_path: Path) -> None:
    put("unsteady://bucket/a.txt", b"over there")
    (tmp_path / "a.txt").write_bytes(b"over here")
    for source, content in (("unsteady://bucket/a.txt", b"over there"), (str(tmp_path / "a.txt"), b"over here")):
        (file,) = resolve_source(source).files
        with open_file(file) as stream:
            assert stream.read() == content


def test_drivers_are_named_for_what_fsspec_calls_them() -> None:
    assert set(remote._DRIVERS) <= set(fsspec.available_protocols())
