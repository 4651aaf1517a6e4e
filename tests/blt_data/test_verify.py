"""`blt-data verify`: every damage of every directory is told, in one line each, whatever the damage."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from blt_data import Shard, ShardKind, verify_directory
from blt_data.commands.verify import verify_command
from blt_data.shards import ShardEntry, directory, files

from .shard_samples import make_directory, some_documents


def flip(file: Path, place: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("kind", list(ShardKind))
def test_all_is_well(tmp_path: Path, kind: ShardKind, compression: str) -> None:
    parts = [some_documents(index, 30) for index in range(3)]
    for name in ("a", "b"):
        make_directory(tmp_path / name, parts, kind=kind, compression=compression)  # type: ignore[arg-type]
    result = CliRunner().invoke(verify_command, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(re.findall(rf"/[ab] +│ {kind} +│ +3 │ +90 │ .* │ right", result.stdout)) == 2


def test_every_problem_of_every_directory_is_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        make_directory(tmp_path / name, [some_documents(index, 5) for index in range(6)])
    flip(tmp_path / "a" / "shard-00001.arrow")
    (tmp_path / "a" / "shard-00003.arrow").unlink()
    (tmp_path / "a" / "shard-00004.arrow").unlink()
    (tmp_path / "a" / "shard-00004.arrow").mkdir()
    (tmp_path / "a" / "stray.arrow").write_bytes(b"")
    (tmp_path / "b" / "manifest.json").unlink()
    os.truncate(tmp_path / "c" / "shard-00005.arrow", 100)
    told = []
    for workers in ("1", "4"):
        paths = [str(tmp_path / name) for name in ("a", "b", "c")]
        result = CliRunner().invoke(verify_command, [*paths, "--workers", workers])
        assert result.exit_code == 1
        told.append(result.stderr)
        assert re.search(r"/a .* 4 wrong", result.stdout)
        assert re.search(r"/c .* 1 wrong", result.stdout)
    assert told[0] == told[1]
    patterns = [
        r"b: has no manifest\.json.*",
        r"a/shard-00001\.arrow: does not have the checksum .*; delete the directory and run .*",
        r"a/shard-00003\.arrow: is missing, .*",
        r"a/shard-00004\.arrow: is no file, .*",
        r"a/stray\.arrow: is not named by manifest\.json; delete it",
        r"c/shard-00005\.arrow: has 100 bytes, manifest\.json says .*",
    ]
    for line, pattern in zip(told[0].splitlines(), patterns, strict=True):
        assert re.fullmatch(f"error: .*/{pattern}", line)


def test_an_unreadable_shard_does_not_hide_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_directory(tmp_path / "d", [some_documents(index, 5) for index in range(3)])
    flip(tmp_path / "d" / "shard-00002.arrow")
    hashed = files.file_crc32

    def fail(path: Path, advance: Callable[[int], None] | None) -> str:
        if path.name == "shard-00000.arrow":
            raise PermissionError(13, "Permission denied", str(path))
        return hashed(path, advance)

    monkeypatch.setattr(directory, "file_crc32", fail)
    first, second = verify_directory(tmp_path / "d", workers=2)
    assert re.search(r"shard-00000\.arrow: cannot be read \(Permission denied\); check its permissions", first)
    assert "shard-00002.arrow: does not have the checksum" in second


def test_progress_counts_every_byte_and_every_shard(tmp_path: Path) -> None:
    manifest = make_directory(tmp_path / "d", [some_documents(index, 500, longest=20_000) for index in range(3)])
    amounts: list[int] = []
    entries: list[ShardEntry] = []

    def tell(amount: int, entry: ShardEntry | None) -> None:
        amounts.append(amount)
        if entry is not None:
            entries.append(entry)

    assert verify_directory(tmp_path / "d", workers=3, on_progress=tell) == []
    assert sum(amounts) == sum(entry.file_bytes for entry in manifest.shards)
    assert sorted(entry.name for entry in entries) == [entry.name for entry in manifest.shards]
    assert len(amounts) > 15


def test_two_shards_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until the other is being read as well; with one worker that would break the barrier."""
    make_directory(tmp_path / "d", [some_documents(index, 5) for index in range(2)])
    opened, barrier = Shard.open, threading.Barrier(2)

    def wait(path: Path, *, verify: bool) -> Shard:
        barrier.wait(timeout=20)
        return opened(path, verify=verify)

    monkeypatch.setattr(Shard, "open", wait)
    assert verify_directory(tmp_path / "d", workers=2) == []


def test_names_that_are_no_utf8_and_manifests_that_are_no_files(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    make_directory(odd, [some_documents(1, 3)])
    for name in ("fifo", "loop", "well"):
        make_directory(tmp_path / name, [some_documents(1, 3)])
    for name in ("fifo", "loop"):
        (tmp_path / name / "manifest.json").unlink()
    os.mkfifo(tmp_path / "fifo" / "manifest.json")
    (tmp_path / "loop" / "manifest.json").symlink_to("manifest.json")
    program = "from blt_data.commands.verify import verify_command; verify_command()"
    done = subprocess.run(
        [sys.executable, "-c", program, odd, *(tmp_path / name for name in ("fifo", "loop", "well"))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert len(re.findall(r"│ right", done.stdout)) == 2
    assert re.fullmatch(
        r"error: .*/fifo/manifest\.json: is no regular file; .*\nerror: .*/loop/manifest\.json: Too many levels .*\n",
        done.stderr,
    )


def test_an_unfinished_split_is_told(tmp_path: Path) -> None:
    for split in ("train", "holdout"):
        make_directory(tmp_path / split, [some_documents(1, 3)])
    assert CliRunner().invoke(verify_command, [str(tmp_path)]).exit_code == 0
    (tmp_path / "train" / "manifest.json").unlink()
    result = CliRunner().invoke(verify_command, [str(tmp_path)])
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*/train: has no manifest\.json.*\n", result.stderr)


@pytest.mark.parametrize("damaged", [False, True])
def test_problems_are_not_lost_with_the_reader_of_the_table(tmp_path: Path, damaged: bool) -> None:
    make_directory(tmp_path / "d", [some_documents(1, 3)])
    if damaged:
        flip(tmp_path / "d" / "shard-00000.arrow")
    program = "from blt_data.commands.verify import verify_command; verify_command()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "d")],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr.count("\n")) == (int(damaged), int(damaged))


def test_lines_of_progress_in_a_log(tmp_path: Path) -> None:
    make_directory(tmp_path / "d", [some_documents(index, 300, longest=20_000) for index in range(2)])
    program = "from blt_data.commands.verify import verify_command; verify_command()"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "d")],
        env=os.environ | {"BLT_PROGRESS_SECONDS": "0.002"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert len(lines) >= 2
    assert re.fullmatch(r"verifying: 100%, 2/2 shards, 600 documents, [\d,.]+ MB/s, 0:00:00 left", lines[-1])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (["absent"], 1, "absent: no such directory"),
        (["empty"], 1, r"empty: has no manifest\.json"),
        (["file"], 1, "file: is a file, not a shard directory"),
        (["x" * 300], 1, "File name too long"),
        (["empty", "--workers", "0"], 2, "--workers"),
    ],
)
def test_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    result = CliRunner().invoke(verify_command, arguments)
    assert result.exit_code == code
    assert re.search(message, result.stderr), result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1
