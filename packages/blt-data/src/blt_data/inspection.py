"""What `blt-data inspect` shows: figures per shard, provenance, and a few documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from blt_data.console import format_bytes, print_table
from blt_data.shards import JSON, Shard, ShardDirectory, ShardKind


def show_directory(path: Path, *, documents: int, preview_bytes: int) -> None:
    """Print figures, provenance and the first documents of a shard directory.

    Args:
        path: the directory.
        documents: how many documents to show.
        preview_bytes: how many bytes of each.

    Raises:
        InputError: the directory is missing, incomplete or damaged.
    """
    directory = ShardDirectory.open(path)
    manifest = directory.manifest
    patched = directory.kind is ShardKind.PATCHED
    header = ["shard", "documents", "bytes", "mean bytes", *(["patches", "mean patch"] if patched else []), "file"]
    rows = [
        _figures(entry.name, entry.documents, entry.bytes, entry.patches, entry.file_bytes) for entry in manifest.shards
    ]
    file_bytes = sum(entry.file_bytes for entry in manifest.shards)
    rows.append(_figures("total", manifest.documents, manifest.bytes, manifest.patches, file_bytes))
    print_table(f"{path} (kind: {manifest.kind})", rows, header)
    facts: dict[str, object] = {"fingerprint": manifest.fingerprint()}
    facts |= {
        f"skipped: {reason}": f"{skip.count:,} ({format_bytes(skip.bytes)})"
        for reason, skip in manifest.skipped.items()
    }
    facts |= dict(_flat("", dict(manifest.provenance)))
    print_table("provenance", facts)
    for shard, row in _first_documents(directory, documents):
        content = shard.content(row)
        shown = _beginning(content, preview_bytes)
        more = "…" if len(content) > len(shown) else ""
        click.echo(f"\n{escape_bytes(shard.document_id(row).encode())}  ({shard.source(row)}, {len(content):,} bytes)")
        click.echo(f"  {escape_bytes(shown)}{more}")
    click.echo("")


def _figures(name: str, documents: int, content: int, patches: int | None, file_bytes: int) -> list[object]:
    figures: list[object] = [name, documents, content, content / max(1, documents)]
    if patches is not None:
        # Framed tokens per patch: BOS and EOS count.
        figures += [patches, (content + 2 * documents) / max(1, patches)]
    return [*figures, format_bytes(file_bytes)]


def _first_documents(directory: ShardDirectory, count: int) -> Iterator[tuple[Shard, int]]:
    for index in range(len(directory)):
        if not count:
            return
        # What is shown is what was written, or nothing is.
        shard = directory.verified_shard(index)
        shown = min(count, len(shard))
        yield from ((shard, row) for row in range(shown))
        count -= shown


def _beginning(content: npt.NDArray[np.uint8], size: int) -> bytes:
    """Return at most `size` bytes without cutting a UTF-8 character, which has at most three continuation bytes."""
    for end in range(size, max(0, size - 4), -1):
        if len(content) <= end or content[end] & 0xC0 != 0x80:
            return content[:end].tobytes()
    return content[:size].tobytes()


def escape_bytes(data: bytes) -> str:
    r"""Return bytes as one line of printable text: the rest becomes \n, \x00 and the like.

    A character cut off at either end counts as bytes that are no text.

    Args:
        data: any bytes.
    """
    pieces = []
    for character in data.decode("utf-8", errors="surrogateescape"):
        if character.isprintable():
            pieces.append(character)
        elif 0xDC80 <= ord(character) <= 0xDCFF:
            pieces.append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            pieces.append(character.encode("unicode_escape").decode())
    return "".join(pieces)


def _flat(prefix: str, value: dict[str, JSON]) -> Iterator[tuple[str, object]]:
    """Yield nested facts under dotted names."""
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            yield from _flat(f"{name}.", item)
        else:
            yield name, "none" if item is None else item
