"""Documents that are hard to keep whole, and the source formats to put them in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from blt_data import ShardDirectory

#: Every one has given some pipeline trouble.
HARD_TEXTS = [
    "",
    "a",
    "\n",
    "\0",
    "with\0NUL\0",
    "CRLF\r\nlines\r\nand\rCR\n",
    "\ufeffbyte order mark\ufeff",
    "  leading and trailing space \t\n\n",
    "Ελληνικά кириллица עברית العربية हिन्दी தமிழ் ไทย 中文 日本語 한국어 ქართული አማርኛ",
    "👩‍👩‍👧‍👦🏳️‍🌈🇪🇺 e\u0301 \u00e9 \U0010ffff \ufffd \ufffe",
    "\u2028line separator\u2029\x85\x0b\x0c\x1c\x1d",
    '"quotes" \\ backslash \\n \\u0041 {"text": 1}',
    "x" * 5000 + "é" * 5000,
    "日" * 40_000,
]


def write_parquet(path: Path, texts: Sequence[str | None], *, ids: Sequence[str] | None = None, group: int = 4) -> None:
    columns: dict[str, object] = {"text": pa.array(texts, pa.string())}
    if ids is not None:
        columns["id"] = ids
    columns["url"] = ["http://example.org"] * len(texts)
    pq.write_table(pa.table(columns), path, row_group_size=group, compression="zstd")


def json_lines(texts: Sequence[str], ids: Sequence[str] | None = None, *, ascii_only: bool = False) -> bytes:
    records = [{"text": text, "metadata": {"n": 1}} for text in texts]
    if ids is not None:
        records = [record | {"id": name} for record, name in zip(records, ids, strict=True)]
    return b"\n".join(json.dumps(record, ensure_ascii=ascii_only).encode() for record in records)


def write_compressed(path: Path, data: bytes) -> None:
    codec = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}.get(path.suffix)
    if codec is None:
        path.write_bytes(data)
        return
    with pa.OSFile(str(path), "wb") as raw, pa.CompressedOutputStream(raw, codec) as stream:
        stream.write(data)


def read_documents(directory: Path) -> list[tuple[str, bytes]]:
    """Return (id, bytes) of every document of a shard directory, after checking every checksum."""
    shards = ShardDirectory.open(directory, verify=True)
    return [
        (shards.shard(shard).document_id(row), shards.shard(shard).content(row).tobytes())
        for shard, row in shards.documents()
    ]


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file under a directory by its relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
