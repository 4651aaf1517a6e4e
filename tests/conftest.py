"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Test processes run side by side on few cores: one thread each is fastest, and what subprocesses inherit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests start hundreds of processes that load torch, which takes each twice as long where Python keeps no bytecode, as
# in many containers. It is kept in pytest's own folder then, as nobody wants it beside the sources.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(REPOSITORY / ".pytest_cache" / "bytecode"))
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

# The executor sets this before it imports Ray; some tests import Ray before the executor does.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

#: The files that take longest, longest first. They are begun first, so that no process is left with one at the end.
SLOWEST = (
    "end_to_end/test_quickstart.py",
    "blt_model/test_segment_kernels.py",
    "blt_train/test_nodes.py",
    "blt_train/test_slurm_job.py",
    "blt_train/test_resume.py",
    "blt_data/test_ray.py",
    "blt_train/test_elastic.py",
    "blt_train/test_parallel.py",
    "blt_data/test_resume.py",
    "blt_train/test_watching.py",
    "blt_train/test_distributed.py",
    "blt_train/test_accumulation.py",
    "blt_patcher/test_workers.py",
    "blt_model/test_tile_attention.py",
    "blt_model/test_generation.py",
    "blt_model/test_kernels.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first; the order is else that of the paths."""
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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


@pytest.fixture(scope="module")
def slurm(repository: Path) -> Iterator[None]:
    """A SLURM cluster on this machine: a controller and a node."""
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("sbatch", "slurmctld", "slurmd", "munged")):
        pytest.skip("needs root and the packages slurm-wlm and munge")
    script = str(repository / "tools" / "loopback_slurm.sh")
    # A short path, for sockets.
    folder = Path("/tmp") / f"slurm-{os.getpid()}"
    subprocess.run([script, "start", str(folder), "4"], check=True, capture_output=True, text=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield
    finally:
        subprocess.run([script, "stop", str(folder)], check=True, capture_output=True)
        shutil.rmtree(folder)
