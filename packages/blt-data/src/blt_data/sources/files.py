"""The files of a source: what they are called, how they hold documents, and what tells that they have not changed."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from blt_data.errors import InputError
from blt_data.shards.schema import JSON, canonical_json
from blt_data.skips import Skips

Compression = Literal["gzip", "zstd"]

UNRECOGNISED: Final = "unrecognised file"

#: What directories are searched for, for messages.
RECOGNISED: Final = (
    "Parquet (.parquet), JSON lines (.jsonl, .json, .ndjson), Arrow (.arrow, .feather, .ipc) or text (.txt), "
    "JSON lines and text also with .gz or .zst"
)

_COMPRESSIONS: Final[Mapping[str, Compression]] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


class Format(StrEnum):
    """How a source file holds documents."""

    PARQUET = "parquet"
    """One document a row."""
    ARROW = "arrow"
    """One document a row: Arrow's IPC file or stream format."""
    JSON_LINES = "json-lines"
    """One document a line."""
    TEXT = "text"
    """The whole file is one document."""
    PYTHON = "python"
    """The whole file is one document, decoded as Python source."""


_FORMATS: Final[Mapping[str, Format]] = {
    ".parquet": Format.PARQUET,
    ".arrow": Format.ARROW,
    ".feather": Format.ARROW,
    ".ipc": Format.ARROW,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".json": Format.JSON_LINES,
    ".txt": Format.TEXT,
}

#: Formats that compress themselves; compressed once more they could not be read in parts.
_SELF_COMPRESSED: Final = {Format.PARQUET: "Parquet", Format.ARROW: "Arrow"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One file to read."""

    location: str
    """Local path, or the URL at which `open_file` finds it; of the hub `hf://datasets/OWNER/NAME@COMMIT/path`."""
    relative: str
    """Path with / relative to what the user named; documents without an id are named after it."""
    format: Format
    compression: Compression | None
    size: int
    """Bytes as stored."""
    version: str
    """What tells a resumed run that the file is still the one it read: time of the last change, ETag or object id."""

    @property
    def is_remote(self) -> bool:
        """Whether the file is read over the network."""
        return "://" in self.location


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """All the files of a source, in the order in which their documents are read."""

    name: str
    """What the source is called unless the user says otherwise."""
    files: tuple[SourceFile, ...]
    origin: Mapping[str, JSON] = field(default_factory=dict)
    """Where the files come from, for the provenance: a hub dataset and its commit, a URL; nothing of this machine."""
    skipped: Skips = field(default_factory=Skips)
    """Files left out."""
    id_column: str | None = None
    """Where this collection is known to keep its ids, or None if it is not known."""

    def provenance(self) -> dict[str, JSON]:
        """Return what decides the documents: names, sizes and, of remote files, versions; no path of this machine."""
        files: list[JSON] = [
            [str(file.format), file.relative, file.size, *([file.version] if file.is_remote else [])]
            for file in self.files
        ]
        listing = canonical_json({"files": files})
        return {
            "name": self.name,
            **self.origin,
            "files": len(self.files),
            "bytes": sum(file.size for file in self.files),
            "listing_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        }


def format_of(name: str, given: Format | None) -> tuple[Format, Compression | None] | None:
    """Return the format and the compression of a file by its name, or None if it is not recognised.

    Args:
        name: the file's name or path.
        given: a format that the user named; the name then tells the compression alone.
    """
    stem, suffix = posixpath.splitext(name.lower())
    compression = _COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = posixpath.splitext(stem)[1]
    kind = given or _FORMATS.get(suffix)
    if kind is None or (kind in _SELF_COMPRESSED and compression is not None):
        return None
    return kind, compression


def format_of_named(name: str, given: Format | None) -> tuple[Format, Compression | None]:
    """Return the format and the compression of a file that the user named: text if its name says nothing else.

    Args:
        name: the file's name or path.
        given: a format that the user named as well.

    Raises:
        InputError: it is a format that compresses itself, compressed.
    """
    found = format_of(name, given)
    if found is not None:
        return found
    stem, suffix = posixpath.splitext(name.lower())
    compression = _COMPRESSIONS.get(suffix)
    kind = given or (_FORMATS.get(posixpath.splitext(stem)[1]) if compression else None)
    if kind in _SELF_COMPRESSED:
        raise InputError(
            f"{name}: is a compressed {_SELF_COMPRESSED[kind]} file; decompress it first, "
            f"{_SELF_COMPRESSED[kind]} compresses itself"
        )
    return Format.TEXT, compression


def in_order(files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """Return files sorted by their relative path, which is the same wherever they lie."""
    return tuple(sorted(files, key=lambda file: file.relative))


def unrecognised(count: int, size: int) -> Skips:
    """Return the account of files left out because nothing tells how they hold documents.

    Args:
        count: how many.
        size: their bytes.
    """
    skips = Skips()
    if count:
        skips.add(UNRECOGNISED, count=count, bytes=size)
    return skips


def check_name(relative: str, location: str | Path) -> None:
    """Refuse a path that is no text: no document could be named after it.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{os.fsencode(location)!r}: its name is no UTF-8, so no document can have it; rename it"
        ) from None
