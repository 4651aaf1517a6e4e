"""Killed runs: the same command again gives the same bytes, and nothing outlives or blocks the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .corpora import files_of, json_lines, write_parquet

BLT_DATA = [sys.executable, "-m", "blt_data.cli"]


def prepare_command(source: Path, output: Path, *options: str) -> list[str]:
    return [*BLT_DATA, "prepare", "--source", str(source), "--output", str(output), *options]


def test_killed_at_every_seventh_step(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_parquet(source / "a.parquet", ["a" * 300, "b" * 300, "c" * 20], group=1)
    (source / "b.jsonl").write_bytes(json_lines(["d" * 500, "e", "c" * 20, "f" * 90]))
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(script), str(source), str(tmp_path), "7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    # Fewer would mean that the hook no longer sees what prepare does.
    assert int(done.stdout) > 60


@pytest.mark.parametrize(("kills", "options"), [("4", []), ("12", ["--in-process"])])
def test_killed_at_random_instants(kills: str, options: list[str]) -> None:
    """A few of the 200 kills that the tool does when it is run by hand."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tools.kill_prepare", "--kills", kills, *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills, all resumed to" in done.stdout


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("large")
    for index in range(12):
        write_parquet(source / f"{index:02d}.parquet", [f"{index} {row} " * 300 for row in range(400)], group=100)
    return source


@pytest.fixture(scope="module")
def whole(large_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that an undisturbed run of one worker leaves."""
    output = tmp_path_factory.mktemp("whole") / "out"
    options = ["--workers", "1", "--shard-size", "200kB"]
    subprocess.run(prepare_command(large_source, output, *options), check=True, capture_output=True)
    return files_of(output)


def test_kill_with_workers(tmp_path: Path, large_source: Path, whole: dict[str, bytes]) -> None:
    options = ["--workers", "2", "--shard-size", "200kB"]
    output = tmp_path / "out"
    killed = subprocess.Popen(prepare_command(large_source, output, *options), stderr=subprocess.DEVNULL)
    try:
        while len(list(output.glob(".work/scatter/*/record.json"))) < 3:
            assert killed.poll() is None
            time.sleep(0.002)
    finally:
        killed.kill()
        killed.wait()
    assert not (output / "manifest.json").exists()
    done = subprocess.run(prepare_command(large_source, output, *options), capture_output=True, text=True, check=True)
    assert "an earlier run finished" in done.stderr
    assert files_of(output) == whole


def test_workers_end_with_the_process_that_started_them(tmp_path: Path, large_source: Path) -> None:
    output = tmp_path / "out"
    command = prepare_command(large_source, output, "--workers", "2", "--shard-size", "200kB")
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(output.glob(".work/scatter/*/record.json")):
        assert killed.poll() is None
        time.sleep(0.002)
    assert len(processes_of_session(killed.pid)) > 2
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 60
    while processes_of_session(killed.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_of_session(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def test_killed_worker_is_replaced(tmp_path: Path, large_source: Path, whole: dict[str, bytes]) -> None:
    """As the kernel does when memory runs out. A plain multiprocessing pool would wait for ever."""
    output = tmp_path / "out"
    command = prepare_command(large_source, output, "--workers", "2", "--shard-size", "200kB")
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(output.glob(".work/scatter/*/record.json")):
        assert running.poll() is None
        time.sleep(0.002)
    # The youngest process is a worker.
    os.kill(max(processes_of_session(running.pid)), signal.SIGKILL)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 0
    assert "Traceback" not in errors
    assert files_of(output) == whole


def test_other_parameters_over_an_unfinished_run_start_anew(tmp_path: Path, large_source: Path) -> None:
    output = tmp_path / "out"
    killed = subprocess.Popen(
        prepare_command(large_source, output, "--workers", "1", "--shard-size", "200kB"), stderr=subprocess.DEVNULL
    )
    while not list(output.glob(".work/scatter/*/record.json")):
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    options = ["--workers", "1", "--shard-size", "1MB", "--holdout-fraction", "0.3"]
    done = subprocess.run(prepare_command(large_source, output, *options), capture_output=True, text=True, check=True)
    assert "an unfinished run with other parameters" in done.stderr
    subprocess.run(prepare_command(large_source, tmp_path / "whole", *options), check=True)
    assert files_of(output) == files_of(tmp_path / "whole")


def test_two_runs_on_one_output(tmp_path: Path, large_source: Path) -> None:
    output = tmp_path / "out"
    command = prepare_command(large_source, output, "--workers", "1", "--shard-size", "200kB")
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(output.glob(".work/scatter/*")):
        assert first.poll() is None
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert second.returncode == 1
    assert "another process is writing to it" in second.stderr


@pytest.mark.parametrize("damage", ["record: {}", "record: {", "index"])
def test_a_task_with_a_damaged_record_is_done_again(
    tmp_path: Path, large_source: Path, whole: dict[str, bytes], damage: str
) -> None:
    options = ["--workers", "1", "--shard-size", "200kB"]
    output = tmp_path / "out"
    killed = subprocess.Popen(prepare_command(large_source, output, *options), stderr=subprocess.DEVNULL)
    try:
        while not (records := list(output.glob(".work/scatter/*/record.json"))):
            assert killed.poll() is None
            time.sleep(0.002)
    finally:
        killed.kill()
        killed.wait()
    index = next(records[0].parent.glob("*.npy"))
    if damage.startswith("record"):
        records[0].write_text(damage.removeprefix("record: "))
    else:
        index.write_bytes(index.read_bytes()[:20])
    done = subprocess.run(prepare_command(large_source, output, *options), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert files_of(output) == whole
