"""Compiling with Numba: where the machine code is kept, and what the processor can do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
from numba.core.registry import cpu_target

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile with Numba, keeping the machine code on disk where some directory lets us.

    Numba looks for a place when a function is decorated and raises where there is none (an installation that is
    read-only, for a user without a writable home); importing the package must not fail for that, so the function is
    then compiled anew in each process.
    """
    try:
        kernel = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        log.debug("no writable directory for Numba's cache: %s is compiled in every process", function.__name__)
        kernel = numba.njit(nogil=True)(function)
    return cast(F, kernel)


def can_compress() -> bool:
    """Return whether the processor that is compiled for packs the bytes of a vector (AVX-512 VBMI2)."""
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    return llvm.llvm_version_info[0] >= 19 and "+avx512vbmi2" in features.split(",")
