"""Small files that commands write where the user says: figures, pages, scheme files."""

from __future__ import annotations

import os
from pathlib import Path

from blt_data.errors import InputError
from blt_data.shards.files import atomic_file


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, atomically; an existing one is replaced.

    Args:
        path: the file.
        data: its whole content.

    Raises:
        InputError: the path is a directory, or its directory is missing.
        OSError: the file cannot be written.
    """
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{file}: is a directory; name a file to write")
    if not file.parent.is_dir():
        raise InputError(f"{file}: cannot be written, {file.parent} is no directory; make it first")
    with atomic_file(file) as opened:
        opened.write(data)
