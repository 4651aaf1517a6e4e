"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Test processes run side by side on few cores: one thread each is fastest, and what subprocesses inherit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The executor sets this before it imports Ray; some tests import Ray before the executor does.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text to develop on; it lies beside the checkout and is no part of it, so tests that use it may skip."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real text beside this checkout")
    return path
