"""What importing the package costs, and where it works."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

from blt_patcher import kernels, vectors

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


def test_kernels_work_on_any_processor(tmp_path: Path) -> None:
    # For a processor without any extension the lengths come from a table instead of vector compression, and vectors
    # are taken apart; the results must be those of this processor.
    code = (
        "import zlib, numpy as np\n"
        "from blt_patcher import *\n"
        "from blt_patcher.vectors import COMPRESSES\n"
        "rng = np.random.default_rng(3)\n"
        "content = rng.choice(np.frombuffer(b'abc 12.\\n\\xc3\\xa9', np.uint8), 9000)\n"
        "offsets = np.array([0, 0, 1, 3000, 8999, 9000])\n"
        "nats = rng.exponential(1.4, 9010).astype(np.float16)\n"
        "schemes = [EntropyScheme(threshold=1.9), EntropyScheme(threshold=9.0, max_patch_length=130), SpaceScheme(),\n"
        "           EntropyCombinedScheme(threshold=1.0, relative_threshold=0.5, max_patch_length=7)]\n"
        "sums = [zlib.crc32(patch_documents(s, content, offsets, nats).lengths.tobytes()) for s in schemes]\n"
        "print(COMPRESSES, sums)"
    )
    here = run(code)
    plain = run(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    assert plain.split(" ", 1) == ["False", here.split(" ", 1)[1]]


def test_kernels_are_compiled_anew_when_their_vectors_change() -> None:
    source = Path(vectors.__file__).read_bytes()
    assert zlib.crc32(source) == kernels.VECTORS_CHECKSUM, f"write 0x{zlib.crc32(source):08X} into kernels.py"
