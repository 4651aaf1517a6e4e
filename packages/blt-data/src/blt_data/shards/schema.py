"""The shard format: column names and types, metadata keys, and the checksum of the payload.

docs/data.md describes the same for readers in other languages; the two change together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

FORMAT_NAME: Final = "blt-shard"
FORMAT_VERSION: Final = 1

DOCUMENT_ID: Final = "document_id"
CONTENT: Final = "content"
SOURCE: Final = "source"
PATCH_LENGTHS: Final = "patch_lengths"
ENTROPIES: Final = "entropies"

#: First bytes of what the payload checksum is taken over.
PAYLOAD_PREFIX: Final = b"blt.payload.1\0"


class ShardKind(StrEnum):
    """What a shard holds besides documents."""

    BYTES = "bytes"
    PATCHED = "patched"


def shard_schema(kind: ShardKind, *, entropies: bool, metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the Arrow schema of a shard.

    Args:
        kind: byte or patched shard.
        entropies: whether a patched shard keeps its entropies.
        metadata: schema metadata, if any.
    """
    fields = [
        pa.field(DOCUMENT_ID, pa.string(), nullable=False),
        pa.field(CONTENT, pa.large_binary(), nullable=False),
        pa.field(SOURCE, pa.dictionary(pa.int32(), pa.string()), nullable=False),
    ]
    if kind is ShardKind.PATCHED:
        fields.append(pa.field(PATCH_LENGTHS, pa.list_(pa.field("item", pa.uint16(), nullable=False)), nullable=False))
        if entropies:
            fields.append(pa.field(ENTROPIES, pa.list_(pa.field("item", pa.float16(), nullable=False)), nullable=False))
    return pa.schema(fields, metadata=dict(metadata) if metadata is not None else None)


def canonical_json(value: Mapping[str, Any]) -> str:
    """Return the one JSON text that equal values share: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: the value holds a NaN or an infinity, which JSON cannot say.
        TypeError: the value holds something that is no JSON.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def column_buffers(column: pa.Array) -> tuple[npt.NDArray[np.signedinteger[Any]], npt.NDArray[Any]]:
    """Return the offsets and the values of a string, binary or list column, without a copy.

    Args:
        column: an Arrow array of n strings, binaries, or lists of uint16 or float16.

    Returns:
        offsets int32 or int64 [n + 1] as stored, and the values that they index: uint8 for strings and binaries,
        uint16 or float16 for lists.
    """
    wide = pa.types.is_large_binary(column.type) or pa.types.is_large_string(column.type)
    offset_type: type[np.signedinteger[Any]] = np.int64 if wide or pa.types.is_large_list(column.type) else np.int32
    buffers = column.buffers()
    # Arrow lets an array of no rows have no offsets at all.
    if len(column) == 0 or buffers[1] is None:
        offsets: npt.NDArray[np.signedinteger[Any]] = np.zeros(1, dtype=offset_type)
    else:
        offsets = np.frombuffer(buffers[1], dtype=offset_type)[column.offset : column.offset + len(column) + 1]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        values = column.values
        item: type[np.generic] = np.float16 if pa.types.is_float16(values.type) else np.uint16
        data, start = values.buffers()[1], values.offset
        flat = np.frombuffer(data, dtype=item)[start : start + len(values)] if data is not None else np.empty(0, item)
        return offsets, flat
    data = buffers[2]
    return offsets, np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, np.uint8)


def payload_sha256(batch: pa.RecordBatch) -> str:
    """Return the SHA-256 (hex) of a shard's logical content, whatever its compression or Arrow layout.

    It is taken over `PAYLOAD_PREFIX`, the number of rows (int64, little-endian), and for each column in schema
    order: its name in UTF-8 and a NUL, its n + 1 offsets rebased to begin at 0 (int64, little-endian), its values
    (UTF-8 or raw bytes; uint16 or float16 little-endian). The dictionary column counts as the strings it stands for.
    """
    digest = hashlib.sha256(PAYLOAD_PREFIX)
    digest.update(np.int64(batch.num_rows).astype("<i8").tobytes())
    for field, column in zip(batch.schema, batch.columns, strict=True):
        logical = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        offsets, values = column_buffers(logical)
        digest.update(field.name.encode() + b"\0")
        digest.update((offsets.astype(np.int64) - int(offsets[0])).astype("<i8", copy=False).data)
        used = values[int(offsets[0]) : int(offsets[-1])]
        digest.update(used.view(np.uint8).data)
    return digest.hexdigest()
