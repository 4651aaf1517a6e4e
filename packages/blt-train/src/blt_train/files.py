"""Durable files: what exists under its final name is whole, also after a crash of the machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in the system's errors of the block: writing to a full disk, it says no name itself.

    Args:
        path: what is being written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Make a file's or directory's present state durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def publish_directory(temporary: Path, final: Path) -> None:
    """Give a finished directory its name: its files become durable first, then the rename.

    Args:
        temporary: the directory as written, on the same file system.
        final: its name; an older directory of that name is replaced.
    """
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    sync(final.parent)


def point_link(link: Path, target: str) -> None:
    """Move a symbolic link to another target, atomically and durably.

    Args:
        link: the link; it may not exist yet.
        target: relative to the link's directory.
    """
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync(link.parent)
