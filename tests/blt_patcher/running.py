"""Running the command line: in a process of its own, or, which is faster, in this one."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from click.testing import CliRunner
from tests.blt_patcher.shards import EXECUTABLE

from blt_patcher.cli import main


def blt_patch(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as users start it, in a directory."""
    return subprocess.run([*EXECUTABLE, *arguments], cwd=directory, capture_output=True, text=True, check=False)


def blt_patch_here(directory: Path, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[str]:
    """The same command in this process, `data` being its standard input; a traceback fails the test."""
    with contextlib.chdir(directory):
        result = CliRunner().invoke(main, list(arguments), input=data)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(list(arguments), result.exit_code, result.stdout, result.stderr)
