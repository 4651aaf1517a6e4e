"""Where tests of Triton kernels run: on CUDA as they are, elsewhere in a process whose Triton interprets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

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


def patch_language_once() -> None:
    """Have the interpreter patch `triton.language` once a launch, and not for every function that a kernel calls.

    That takes half of its time otherwise, and changes nothing that the launch has not changed already.
    """
    if importlib.util.find_spec("triton") is None:
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return
    languages = (interpreter.tl, interpreter.tl.core)
    original, nothing = interpreter._patch_lang, interpreter._LangPatchScope()
    launch: Any = nothing
    patched: set[int] = set()
    known: dict[int, set[int]] = {}

    def seen_by(module: dict[str, Any]) -> set[int]:
        """Which of the languages a module's functions see; modules stay, so it is looked up once."""
        if id(module) not in known:
            known[id(module)] = {id(one) for one in languages if any(value is one for value in module.values())}
        return known[id(module)]

    def patch(function: Any) -> Any:
        nonlocal launch
        seen = seen_by(function.__globals__)
        # A launch undoes what it has patched at its end, and no sooner.
        if not launch._changes:
            launch = original(function)
            patched.clear()
            patched.update(seen)
            return launch
        if seen <= patched:
            return nothing
        patched.update(seen)
        return original(function)

    interpreter._patch_lang = patch


if INTERPRETED:
    patch_language_once()


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
