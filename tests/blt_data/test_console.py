"""What every command line says when the system refuses something."""

from __future__ import annotations

import errno
import os
import pty
import re
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from blt_data.console import (
    ByteSize,
    JobProgress,
    format_bytes,
    format_duration,
    friendly_errors,
    print_skips,
    print_table,
    progress,
)
from blt_data.skips import SkipCount, Skips


def told(error: BaseException) -> str:
    """Return what a command that raises the error says, after checking that it is one sentence and status 1."""

    @click.command()
    @friendly_errors
    def command() -> None:
        raise error

    result = CliRunner().invoke(command)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    return result.stderr.strip()


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOSPC, "; free some space and run the same command again"),
        (errno.EROFS, "; check its permissions or name another path"),
        (errno.EACCES, "; check its permissions or name another path"),
        (errno.EISDIR, ""),
    ],
)
def test_system_errors_name_the_file_and_the_mend(number: int, mend: str) -> None:
    assert told(OSError(number, os.strerror(number), "out/x")) == f"error: out/x: {os.strerror(number)}{mend}"


def test_errors_without_a_file_and_with_bytes_for_one() -> None:
    assert told(OSError(errno.EISDIR, "Is a directory")) == "error: Is a directory"
    assert told(OSError(errno.EISDIR, "Is a directory", b"out")) == "error: out: Is a directory"


def test_too_little_memory_is_told() -> None:
    assert told(MemoryError("Unable to allocate 9 TiB")) == (
        "error: there is too little memory (Unable to allocate 9 TiB); give smaller sizes or use a larger machine"
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("20000000", 20_000_000),
        ("20MB", 20_000_000),
        ("16MiB", 16 << 20),
        (" 1.5 kB ", 1500),
        ("2g", 2 * 10**9),
        ("9007199254740993", 2**53 + 1),
        ("0.001kB", 1),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "MB", "1 XB", "1e9", "nan", "9" * 400, "8388608TiB", "१MB", "0.9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        ByteSize().convert(text, None, None)


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (18_061_641, "18.1 MB"), (4.5e15, "4500.0 TB")]
)
def test_bytes_are_shown_in_decimal_units(amount: float, text: str) -> None:
    assert format_bytes(amount) == text


def test_progress_without_a_terminal_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress("reading", total=4000, unit="B") as bar:
        for _ in range(4):
            now[0] += 31
            bar.advance(1000, "of a.parquet")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 2.0 kB (50%) in 62 s of a.parquet",
        "reading: 4.0 kB (100%) in 124 s of a.parquet",
        "reading: 4.0 kB (100%) in 124 s",
    ]


def test_a_short_task_is_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", total=3, unit="files") as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (192, "0:03:12"), (3599.6, "1:00:00"), (200_000, "2 d 7:33:20")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


class Clock:
    """A monotonic clock that stands still until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("blt_data.progress.time.monotonic", lambda: self.now)


def test_a_job_tells_percent_files_documents_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with JobProgress("preparing", total_bytes=1_000_000_000, total_files=98) as job:
        assert job.status() == "0%, 0/98 files, 0 documents, 0.0 MB/s"
        clock.now += 10
        job.advance(100_000_000, 1234, 250_000_000, files=12)
        assert job.status() == "10%, 12/98 files, 1,234 documents, 25.0 MB/s, 0:01:30 left"
        assert job.summary() == "250.0 MB in 0:00:10 (25.0 MB/s)"


def test_speed_and_time_left_are_those_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with JobProgress("preparing", total_bytes=10_000) as job:
        for step in range(200):
            clock.now += 1
            # Ten bytes a second, and one for the last hundred seconds.
            job.advance(10 if step < 100 else 1, 0, 5_000_000 if step < 100 else 1_000_000)
            status = job.status()
    assert status == "11%, 0 documents, 1.0 MB/s, 2:28:20 left"


def test_what_a_failed_attempt_told_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with JobProgress("preparing", total_bytes=100) as job:
        clock.now += 10
        job.advance(60, 6, 60)
        job.status()
        clock.now += 10
        job.advance(-60, -6, -60)
        assert job.status() == "0%, 0 documents, 0.0 MB/s"


def test_work_of_an_earlier_run_counts_for_the_share_and_not_for_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with JobProgress("scoring", total_bytes=100, total_files=4, noun="shards", done_bytes=50, done_files=2) as job:
        clock.now += 10
        job.advance(25, 1, 25_000_000, files=1)
        assert job.status() == "75%, 3/4 shards, 1 documents, 2.5 MB/s, 0:00:10 left"


def test_a_job_of_unknown_size(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with JobProgress("reading") as job:
        clock.now += 10
        job.advance(2000, 1, 20_000_000)
        assert job.status() == "2.0 kB read, 1 documents, 2.0 MB/s"


JOB = """
import sys, time
from blt_data.console import JobProgress
with JobProgress("preparing", total_bytes=1000, total_files=2) as job:
    for part in range(6):
        job.advance(100, 5, 1000, files=part % 2)
        time.sleep(0.1)
    job.say("a word between")
"""


def test_a_job_without_a_terminal_writes_lines_even_while_nothing_moves() -> None:
    environment = os.environ | {"BLT_PROGRESS_SECONDS": "0.05"}
    program = JOB.replace("job.say", "time.sleep(0.3); job.say")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout == ""
    states = [line for line in lines if line != "a word between"]
    assert len(lines) == len(states) + 1
    assert len(states) >= 8
    pattern = r"preparing: \d+%, \d/2 files, \d+ documents, \d+\.\d MB/s(, 0:00:0\d left)?"
    assert [line for line in states if not re.fullmatch(pattern, line)] == []
    assert states[-1].startswith("preparing: 60%, 3/2 files, 30 documents")


def test_a_short_job_is_quiet_without_a_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, check=True)
    assert done.stderr == "a word between\n"


@pytest.mark.parametrize("columns", ["140", "70"])
def test_a_job_on_a_terminal_draws_a_bar(columns: str) -> None:
    """On one line, whatever the width."""
    main, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", JOB], stderr=terminal, check=True, env=os.environ | {"COLUMNS": columns})
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(main, 65536):
            shown += part
    except OSError:
        pass  # The terminal's other end is closed.
    os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"preparing .*━.* 60%, 3/2 files, 30 documents", text)
    assert "a word between" in text


def test_a_piped_table_keeps_long_cells_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", [("x" * 300, 1, "[bold]")], ("name", "number", "text"))
    assert re.search("x{300} .* 1 .*\\[bold\\]", capsys.readouterr().out)


def test_table_of_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_skips(Skips())
    assert capsys.readouterr().out == ""
    print_skips(Skips({"no JSON": SkipCount(count=2000, bytes=31), "duplicate": SkipCount(count=1, bytes=5000)}))
    rows = [re.findall(r"[^│\s]+(?: [^│\s]+)*", line) for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert rows == [
        ["duplicate", "1", "5,000", "5.0 kB"],
        ["no JSON", "2,000", "31", "31 B"],
        ["total", "2,001", "5,031", "5.0 kB"],
    ]


def test_a_file_name_that_is_no_text_is_escaped() -> None:
    program = (
        "import click\nfrom blt_data.console import *\n"
        "@click.command()\n@friendly_errors\ndef main():\n"
        "    print_table('t', [('caf\\udce9 ☃', 1)]); click.echo('caf\\udce9')\n"
        "main()"
    )
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    shown = done.stdout.decode()
    assert r"caf\udce9 ☃" in shown
    assert shown.splitlines()[-1] == r"caf\udce9"


def test_a_reader_that_has_gone_is_no_error() -> None:
    program = (
        "import click\nfrom blt_data.console import *\n"
        "@click.command()\n@friendly_errors\ndef main():\n"
        "    for _ in range(2000): print_table('title', [('cell', 1)] * 30)\n"
        "main()"
    )
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stderr is not None
    assert running.stdout.readline().strip() == b"title"
    running.stdout.close()
    assert (running.wait(timeout=60), running.stderr.read()) == (0, b"")
    running.stderr.close()
