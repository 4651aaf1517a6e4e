"""What importing the package costs, and where it works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PATCH = "from blt_patcher import SpaceScheme, patch_document; print(patch_document(SpaceScheme(), b'a b').tolist())"


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_core_needs_no_torch() -> None:
    code = f"{PATCH}; import sys; print([name for name in sys.modules if name.split('.')[0] in ('torch', 'blt_model')])"
    assert run(code).splitlines() == ["[1, 2, 2]", "[]"]


def test_kernels_work_without_a_writable_cache(tmp_path: Path) -> None:
    # Numba may keep its machine code nowhere: its own choice of directory is one that cannot be made, and so are the
    # package's and the user's.
    blocked = tmp_path / "file"
    blocked.touch()
    code = (
        "import os, tempfile\n"
        "def refuse(*args, **kwargs): raise PermissionError('read-only')\n"
        "import numba.core.caching as caching\n"
        "caching.os.makedirs = refuse\n"
        "caching.tempfile.TemporaryFile = refuse\n"
        f"{PATCH}"
    )
    assert run(code, NUMBA_CACHE_DIR=str(blocked / "cache"), HOME=str(blocked)) == "[1, 2, 2]"
