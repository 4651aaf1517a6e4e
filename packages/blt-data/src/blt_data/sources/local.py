"""Files on this machine: a directory, a file, a glob, or the embedded corpus."""

from __future__ import annotations

import glob
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path

from blt_data.errors import InputError
from blt_data.sample import PYTHON_STDLIB, standard_library_files
from blt_data.sources.files import (
    RECOGNISED,
    Compression,
    Format,
    Source,
    SourceFile,
    check_name,
    format_of,
    format_of_named,
    in_order,
    unrecognised,
)


def standard_library() -> Source:
    """Return the sources of the running Python's standard library.

    Raises:
        InputError: this Python has none in files.
    """
    root, paths = standard_library_files()
    return Source(
        name=PYTHON_STDLIB,
        files=tuple(_source_file(path, root, Format.PYTHON, None) for path in sorted(paths)),
        origin={"python": platform.python_version()},
    )


def local_source(path: Path, leave_out: Path | None, kind: Format | None) -> Source:
    """Return the files under a path that exists.

    Args:
        path: a file, or a directory, which is searched recursively; links to directories are not followed.
        leave_out: a directory whose files are never part of the source (the output).
        kind: format of all files, or None to go by their names.

    Raises:
        InputError: there is nothing that can be read as documents.
        OSError: a directory cannot be listed.
    """
    if path.is_dir():
        return _directory_source(path, leave_out, kind)
    return Source(name=path.name, files=(_named_file(path, path.parent, kind),))


def glob_source(pattern: str, leave_out: Path | None, kind: Format | None) -> Source | None:
    """Return the files that a glob matches, or None if there are none.

    Args:
        pattern: as in a shell, with `**` for any directories.
        leave_out: a directory whose files are never part of the source.
        kind: format of all files, or None to go by their names.
    """
    fixed = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed)
    paths = [Path(path) for path in glob.glob(pattern, recursive=True)]
    files = [_named_file(path, root, kind) for path in paths if not path.is_dir() and not _is_within(path, leave_out)]
    if not files:
        return None
    return Source(name=root.resolve().name or "root", files=in_order(files))


def _directory_source(root: Path, leave_out: Path | None, kind: Format | None) -> Source:
    files, others = [], list[Path]()
    for path in _walk(root, leave_out):
        recognised = format_of(path.name, kind)
        if recognised is None or not path.is_file():
            others.append(path)
        else:
            files.append(_source_file(path, root, *recognised))
    if not files:
        found = f"{len(others)} files, none of them" if others else "no files, neither"
        raise InputError(
            f"{root}: holds {found} {RECOGNISED}; name a directory that does, or name text files of other names by a "
            "glob"
        )
    size = sum(path.lstat().st_size for path in others)
    return Source(name=root.resolve().name or "root", files=in_order(files), skipped=unrecognised(len(others), size))


def _walk(root: Path, leave_out: Path | None) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for directory, folders, names in os.walk(root, onerror=refuse):
        if _is_within(Path(directory), leave_out):
            folders.clear()
            continue
        yield from (Path(directory, name) for name in names)


def _is_within(path: Path, directory: Path | None) -> bool:
    return directory is not None and path.resolve().is_relative_to(directory.resolve())


def _named_file(path: Path, root: Path, given: Format | None) -> SourceFile:
    kind, compression = format_of_named(str(path), given)
    return _source_file(path, root, kind, compression)


def _source_file(path: Path, root: Path, kind: Format, compression: Compression | None) -> SourceFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is no regular file; write it to a file first")
    relative = path.relative_to(root).as_posix()
    check_name(relative, path)
    return SourceFile(
        location=str(path),
        relative=relative,
        format=kind,
        compression=compression,
        size=status.st_size,
        version=str(status.st_mtime_ns),
    )
