"""Where tests of Triton kernels run: on CUDA as they are, elsewhere in a process whose Triton interprets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
#: Whether Triton runs its functions itself; it decides that when it is loaded.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

runs_interpreted = pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests run as they are")
"""Marks the test that runs the others of its file in the interpreter."""
compiles = pytest.mark.skipif(INTERPRETED, reason="Triton interprets")
"""Marks tests that compile kernels without running them, which needs no GPU."""


def need_kernels() -> None:
    """Skip a test where no kernel can run."""
    pytest.importorskip("triton")
    if not (CUDA or INTERPRETED):
        pytest.skip("needs CUDA or Triton's interpreter, in which test_in_the_interpreter runs it")


def run_interpreted(file: str, *options: str) -> None:
    """Run a file's tests in a process whose Triton interprets; some must run, and all of these pass."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *options, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
