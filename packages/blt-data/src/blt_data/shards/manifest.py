"""The manifest of a shard directory: the figures of every shard, written last, so its presence means "complete"."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self, cast

from blt_data.errors import InputError
from blt_data.shards.files import atomic_file, remove_temporaries
from blt_data.shards.schema import JSON, ShardKind, canonical_json
from blt_data.skips import Skips

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_FORMAT: Final = "blt-shards"

#: Version 1 had a SHA-256 for each file and no sizes of what was skipped.
MANIFEST_VERSION: Final = 2

#: Subdirectories that a command with held-out documents makes, each a shard directory of its own.
SPLIT_NAMES: Final = ("train", "holdout")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """What the manifest says of one shard."""

    name: str
    """File name within the directory."""
    documents: int
    bytes: int
    """Raw content bytes of all documents, without framing."""
    patches: int | None
    """None in a byte shard."""
    entropies: bool
    """Whether the shard keeps one entropy per framed token."""
    payload_sha256: str
    """Checksum of the logical content; see `payload_sha256`."""
    file_bytes: int
    file_crc32: str
    """Checksum of the whole file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a shard directory holds and where it came from."""

    kind: ShardKind
    shards: tuple[ShardEntry, ...]
    provenance: Mapping[str, JSON] = field(default_factory=dict)
    skipped: Skips = field(default_factory=Skips)
    """Reason to number and bytes of source documents or files left out for it."""

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(entry.documents for entry in self.shards)

    @property
    def bytes(self) -> int:
        """Raw content bytes in all shards."""
        return sum(entry.bytes for entry in self.shards)

    @property
    def patches(self) -> int | None:
        """Patches in all shards; None in a directory of byte shards."""
        if self.kind is ShardKind.BYTES:
            return None
        return sum(entry.patches or 0 for entry in self.shards)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) that names this content: over every shard's name and payload checksum, in order."""
        lines = "".join(f"{entry.name} {entry.payload_sha256}\n" for entry in self.shards)
        return hashlib.sha256(lines.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as the object that manifest.json holds."""
        return {
            "format": MANIFEST_FORMAT,
            "version": MANIFEST_VERSION,
            "kind": str(self.kind),
            "fingerprint": self.fingerprint(),
            "documents": self.documents,
            "bytes": self.bytes,
            "patches": self.patches,
            "skipped": self.skipped.to_json(),
            "provenance": dict(self.provenance),
            "shards": [asdict(entry) for entry in self.shards],
        }

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the manifest that an object read from manifest.json describes.

        Raises:
            InputError: the object is no manifest of this version, or its figures contradict each other.
        """
        if not isinstance(data, dict) or data.get("format") != MANIFEST_FORMAT:
            raise InputError(
                "is no shard manifest; name a directory that blt-data prepare or blt-patch precompute wrote"
            )
        if data.get("version") != MANIFEST_VERSION:
            raise InputError(
                f"has format version {data.get('version')!r}, this program reads version {MANIFEST_VERSION}; "
                "update blt-data or prepare the data again"
            )
        try:
            manifest = cls(
                kind=ShardKind(data["kind"]),
                shards=_entries_from_json(data["shards"], ShardKind(data["kind"])),
                provenance=_object_from_json(data["provenance"], "provenance"),
                skipped=Skips.from_json(data["skipped"]),
            )
        except KeyError as error:
            raise InputError(f"is damaged (it has no {error}); prepare the data again") from error
        except ValueError as error:
            raise InputError(f"is damaged ({error}); prepare the data again") from error
        for key in ("fingerprint", "documents", "bytes", "patches"):
            if data.get(key) != manifest.to_json()[key]:
                raise InputError(f"is damaged: its {key} does not agree with its shards; prepare the data again")
        return manifest


def _object_from_json(data: object, key: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"its {key} must be an object")
    return data


def _entries_from_json(data: object, kind: ShardKind) -> tuple[ShardEntry, ...]:
    if not isinstance(data, list):
        raise ValueError("its shards must be a list")
    entries = tuple(_entry_from_json(entry, kind) for entry in data)
    if len({entry.name for entry in entries}) != len(entries):
        raise ValueError("it names a shard twice")
    return entries


def _entry_from_json(data: object, kind: ShardKind) -> ShardEntry:
    names = {item.name for item in fields(ShardEntry)}
    if not isinstance(data, dict) or set(data) != names:
        raise ValueError(f"a shard's entry must have exactly the keys {', '.join(sorted(names))}")
    # Whatever follows counts, adds and opens files by these values.
    rules = {
        "name": _is_file_name,
        "documents": _is_count,
        "bytes": _is_count,
        "patches": _is_count if kind is ShardKind.PATCHED else lambda value: value is None,
        "entropies": lambda value: isinstance(value, bool) and (kind is ShardKind.PATCHED or not value),
        "payload_sha256": _is_sha256,
        "file_bytes": _is_count,
        "file_crc32": _is_crc32,
    }
    for key, is_right in rules.items():
        if not is_right(data[key]):
            raise ValueError(f"the {key} of a shard cannot be {_brief(data[key])}")
    return ShardEntry(**cast("dict[str, Any]", data))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_crc32(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None


def _is_file_name(value: object) -> bool:
    """Return whether a value names a file in the directory itself: a shard never lies elsewhere."""
    return isinstance(value, str) and re.fullmatch(r"\w[\w.-]{0,200}", value, re.ASCII) is not None


def _brief(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write manifest.json atomically, after removing the temporary files of killed shard writers.

    Call it last, from one process: its presence tells readers that the directory is complete.

    Args:
        directory: the shard directory; it must exist.
        manifest: what to write.
    """
    path = Path(directory)
    remove_temporaries(path)
    # Through canonical_json first: it refuses what JSON cannot hold.
    value = json.loads(canonical_json(manifest.to_json()))
    with atomic_file(path / MANIFEST_NAME) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read manifest.json of a shard directory.

    Raises:
        InputError: the directory or the manifest is missing, or the manifest is damaged.
    """
    path = Path(directory)
    file = path / MANIFEST_NAME
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: is no regular file; prepare the data again")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(_why_no_manifest(path)) from None
    except NotADirectoryError:
        raise InputError(f"{path}: is a file, not a shard directory; name the directory that holds it") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: is damaged (no UTF-8); prepare the data again") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is damaged (no JSON: {error}); prepare the data again") from error
    try:
        return Manifest.from_json(data)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _why_no_manifest(path: Path) -> str:
    if not path.exists():
        return f"{path}: no such directory; name a directory written by blt-data prepare or blt-patch precompute"
    parts = [name for name in SPLIT_NAMES if (path / name / MANIFEST_NAME).exists()]
    if parts:
        return f"{path}: holds {' and '.join(parts)}, each a shard directory of its own; name {path / parts[0]}"
    return (
        f"{path}: has no {MANIFEST_NAME}, so it is no complete shard directory; "
        "run the command that writes it to its end"
    )
