"""What every command line says when the system refuses something."""

from __future__ import annotations

import errno
import os

import click
import pytest
from click.testing import CliRunner

from blt_data.console import friendly_errors


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
