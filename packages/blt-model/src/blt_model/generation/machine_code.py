"""Machine code of kernels in CUDA C++: compiled by NVRTC, which comes with torch on Linux, and kept on disk.

Compiling takes seconds and gives the same every time, so what was compiled lies in `blt-model` in the user's cache
folder (`XDG_CACHE_HOME`, or `~/.cache`), each under a name that is a function of all that it depends on. Where nothing
can be kept there, kernels are compiled once a process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blt_model.errors import ModelError

_DIGEST = hashlib.sha256().digest_size
"""Bytes before the machine code in a file, which say whether it is whole."""


@functools.cache
def compiles_for(architecture: int) -> bool:
    """Whether NVRTC is at hand and knows an architecture, as 90 for compute capability 9.0."""
    try:
        from cuda.bindings import nvrtc

        error, known = nvrtc.nvrtcGetSupportedArchs()
    except (ImportError, RuntimeError):
        return False
    return int(error) == 0 and architecture in known


def machine_code(source: str, macros: Mapping[str, int], architecture: int) -> bytes:
    """The machine code of a source.

    Args:
        source: in CUDA C++.
        macros: what is defined in it.
        architecture: as 90 for compute capability 9.0.

    Returns:
        A CUBIN, which is an ELF file.

    Raises:
        ModelError: NVRTC does not take it; with its reasons.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    version = checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()
    path = _folder() / f"{key}.cubin"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        digest, image = kept[:_DIGEST], kept[_DIGEST:]
        if hashlib.sha256(image).digest() == digest:
            return image
    image = _compiled(source, options)
    with contextlib.suppress(OSError):
        _keep(image, path)
    return image


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "blt-model"


def _keep(image: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _compiled(source: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        outcome = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(outcome[0]) != 0:
            log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise ModelError(f"NVRTC cannot compile a kernel: {log.decode(errors='replace')}")
        image: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
        checked(nvrtc.nvrtcGetCUBIN(program, image))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return image


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver or of NVRTC gave.

    Raises:
        ModelError: the call failed.
    """
    error, *values = result
    if int(error) != 0:
        raise ModelError(f"a call of CUDA failed: {error.name}.")
    return values[0] if len(values) == 1 else tuple(values)
