"""What every command line says when the system refuses something."""

from __future__ import annotations

import errno
import os
import time

import click
import pytest
from click.testing import CliRunner

from blt_data.console import ByteSize, format_bytes, friendly_errors, progress


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
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "MB", "1 XB", "1e9", "nan"])
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
