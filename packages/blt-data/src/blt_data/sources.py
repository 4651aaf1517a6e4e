"""From what the user names (a file, a directory, a glob, the embedded corpus) to an ordered list of source files."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from blt_data.errors import InputError
from blt_data.sample import PYTHON_STDLIB, standard_library_files

Compression = Literal["gzip", "zstd"]

UNRECOGNISED: Final = "unrecognised file"

_COMPRESSIONS: Final[Mapping[str, Compression]] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


class Format(StrEnum):
    """How a source file holds documents."""

    PARQUET = "parquet"
    """One document a row."""
    JSON_LINES = "json-lines"
    """One document a line."""
    TEXT = "text"
    """The whole file is one document."""
    PYTHON = "python"
    """The whole file is one document, decoded as Python source."""


_FORMATS: Final[Mapping[str, Format]] = {
    ".parquet": Format.PARQUET,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".json": Format.JSON_LINES,
    ".txt": Format.TEXT,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file to read."""

    path: Path
    relative: str
    """Path with / relative to what the user named; documents without an id are named after it."""
    format: Format
    compression: Compression | None
    size: int
    """Bytes on the disk."""
    modified_ns: int
    """Time of the last change; tells a resumed run that the file is still the one it read."""

    @property
    def location(self) -> str:
        """What messages call the file."""
        return str(self.path)

    @property
    def version(self) -> str:
        """What tells a resumed run that the file is still the one it read."""
        return str(self.modified_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """All the files of a source, in the order in which their documents are written."""

    name: str
    files: tuple[SourceFile, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Reason to number of files left out for it."""


def resolve_source(source: str, *, leave_out: Path | None = None) -> Source:
    """Find the files of a source, sorted by their relative path.

    Args:
        source: `python-stdlib`, a file, a directory (searched recursively; links to directories are not followed) or
            a glob. A file named directly or by a glob is read as text if its name says nothing else.
        leave_out: a directory whose files are never part of the source (the output).

    Raises:
        InputError: nothing is there, or nothing that can be read as documents.
        OSError: a directory cannot be listed.
    """
    if source == PYTHON_STDLIB:
        root, paths = standard_library_files()
        return Source(
            name=PYTHON_STDLIB, files=tuple(_source_file(path, root, Format.PYTHON, None) for path in sorted(paths))
        )
    if not source:
        # An unset variable of a shell must not turn into the working directory.
        raise InputError(f"the source is an empty text; name a file, a directory, a quoted glob, or {PYTHON_STDLIB}")
    path = Path(source)
    if path.is_dir():
        return _directory_source(path, leave_out)
    if path.exists():
        return Source(name=path.name, files=(_named_file(path, path.parent),))
    if glob.has_magic(source):
        return _glob_source(source, leave_out)
    raise InputError(f"{source}: no such file or directory; name one, or a quoted glob, or {PYTHON_STDLIB}")


def _directory_source(root: Path, leave_out: Path | None) -> Source:
    files, unrecognised = [], 0
    for path in _walk(root, leave_out):
        recognised = _format_of(path)
        if recognised is None or not path.is_file():
            unrecognised += 1
        else:
            files.append(_source_file(path, root, *recognised))
    if not files:
        found = f"{unrecognised} files, none of them" if unrecognised else "no files, neither"
        raise InputError(
            f"{root}: holds {found} Parquet (.parquet), JSON lines (.jsonl, .json, .ndjson) or text (.txt), also with "
            ".gz or .zst; name a directory that does, or name text files of other names by a glob"
        )
    name = root.resolve().name or "root"
    return Source(name=name, files=_in_order(files), skipped={UNRECOGNISED: unrecognised} if unrecognised else {})


def _glob_source(pattern: str, leave_out: Path | None) -> Source:
    fixed = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = Path(*fixed)
    paths = [Path(path) for path in glob.glob(pattern, recursive=True)]
    files = [_named_file(path, root) for path in paths if not path.is_dir() and not _is_within(path, leave_out)]
    if not files:
        raise InputError(f"{pattern}: no file matches this glob; check it with ls")
    return Source(name=root.resolve().name or "root", files=_in_order(files))


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


def _in_order(files: list[SourceFile]) -> tuple[SourceFile, ...]:
    return tuple(sorted(files, key=lambda file: file.relative))


def _format_of(path: Path) -> tuple[Format, Compression | None] | None:
    suffix = path.suffix.lower()
    compression = _COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = Path(path.stem).suffix.lower()
    kind = _FORMATS.get(suffix)
    # Parquet compresses itself; a compressed Parquet file cannot be read by row groups.
    if kind is None or (kind is Format.PARQUET and compression is not None):
        return None
    return kind, compression


def _named_file(path: Path, root: Path) -> SourceFile:
    """Return a file that the user named: text if its name says nothing else."""
    kind, compression = _format_of(path) or (Format.TEXT, _COMPRESSIONS.get(path.suffix.lower()))
    if path.name.lower().endswith((".parquet.gz", ".parquet.zst", ".parquet.zstd")):
        raise InputError(f"{path}: is a compressed Parquet file; decompress it first, Parquet compresses itself")
    return _source_file(path, root, kind, compression)


def _source_file(path: Path, root: Path, kind: Format, compression: Compression | None) -> SourceFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is no regular file; write it to a file first")
    relative = path.relative_to(root).as_posix()
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{os.fsencode(path)!r}: its name is no UTF-8, so no document can have it; rename it"
        ) from None
    return SourceFile(
        path=path,
        relative=relative,
        format=kind,
        compression=compression,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
    )
