"""The embedded corpus: the sources of the running Python's standard library, there wherever Python is."""

from __future__ import annotations

import codecs
import io
import sysconfig
import tokenize
from pathlib import Path
from typing import Final

from blt_data.errors import InputError

#: What the user says instead of a path.
PYTHON_STDLIB: Final = "python-stdlib"

UNDECODABLE: Final = "undecodable Python source"

_LEFT_OUT: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def standard_library_files() -> tuple[Path, list[Path]]:
    """Return the standard library's directory and its Python files.

    Left out are tests, packages installed beside it, and `_sysconfigdata*.py`, which is generated for one machine.

    Raises:
        InputError: this Python keeps its library elsewhere than in files (in a zip archive, for instance).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in root.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
        and path.is_file()
    ]
    if not paths:
        raise InputError(f"{root}: this Python has no standard library sources there; name files with --source instead")
    return root, paths


def decode_python(data: bytes) -> str | None:
    """Return Python source as text, by its declared encoding (PEP 263), or None if it cannot be decoded.

    Nothing is normalised: line ends stay, and UTF-8 sources come back to the same bytes, byte order mark included.

    Args:
        data: the file's bytes.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        # `utf-8-sig` would swallow the byte order mark.
        return codecs.decode(data, "utf-8" if encoding == "utf-8-sig" else encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None
