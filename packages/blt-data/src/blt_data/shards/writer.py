"""Writing one shard, atomically and reproducibly: equal arguments give equal bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt_data.framing import FRAME_TOKENS
from blt_data.shards.files import atomic_file
from blt_data.shards.manifest import ShardEntry
from blt_data.shards.schema import (
    CONTENT,
    ENTROPIES,
    FORMAT_NAME,
    FORMAT_VERSION,
    JSON,
    PATCH_LENGTHS,
    ShardKind,
    canonical_json,
    column_buffers,
    payload_sha256,
    shard_schema,
)


def write_shard(
    path: str | os.PathLike[str],
    *,
    kind: ShardKind,
    document_ids: Sequence[str] | pa.Array,
    contents: Sequence[bytes] | pa.Array,
    sources: Sequence[str] | pa.Array,
    patch_lengths: pa.Array | None = None,
    entropies: pa.Array | None = None,
    provenance: Mapping[str, JSON],
    compression: Literal["none", "zstd"] = "none",
) -> ShardEntry:
    """Write one shard; the file appears under its name only when it is whole and on the disk.

    Args:
        path: the file to write, on a local file system; an existing one is replaced.
        kind: a patched shard needs `patch_lengths`, a byte shard refuses them.
        document_ids: n document ids.
        contents: n documents: bytes, or an Arrow array (binary, large_binary, string or large_string; an Arrow
            large_binary or large_string array is written without a copy).
        sources: n names of where each document comes from; an Arrow array may be a dictionary.
        patch_lengths: Arrow list<uint16> of n; each sums to the document's bytes + 2 and begins with 1 (BOS alone).
        entropies: Arrow list<float16> of n, one per framed token; only in a patched shard.
        provenance: JSON that says how the content came about; without times, hosts or output paths, so that equal
            input gives equal files.
        compression: `zstd` makes the file smaller, but it is then decompressed into memory when opened.

    Returns:
        The shard's entry for the manifest.

    Raises:
        ValueError: the columns do not fit together.
        OSError: the file cannot be written.
    """
    target = Path(path)
    batch = _record_batch(kind, document_ids, contents, sources, patch_lengths, entropies)
    num_bytes, num_patches = _count(batch, kind)
    payload = payload_sha256(batch)
    metadata = {
        "blt.format": FORMAT_NAME,
        "blt.version": str(FORMAT_VERSION),
        "blt.kind": str(kind),
        **_figures(batch.num_rows, num_bytes, payload),
        "blt.provenance": canonical_json(provenance),
        **({} if num_patches is None else {"blt.patches": str(num_patches)}),
    }
    schema = shard_schema(kind, entropies=entropies is not None, metadata=metadata)
    options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression, use_threads=False)
    with atomic_file(target) as file, pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema, options=options) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    return ShardEntry(
        name=target.name,
        documents=batch.num_rows,
        bytes=num_bytes,
        patches=num_patches,
        entropies=entropies is not None,
        payload_sha256=payload,
        file_bytes=file.size,
        file_crc32=file.crc32,
    )


def _figures(documents: int, num_bytes: int, payload: str) -> dict[str, str]:
    return {"blt.documents": str(documents), "blt.bytes": str(num_bytes), "blt.payload_sha256": payload}


def _count(batch: pa.RecordBatch, kind: ShardKind) -> tuple[int, int | None]:
    """Return the content bytes and, in a patched shard, the patches, which are checked first."""
    offsets, _ = column_buffers(batch.column(CONTENT))
    num_bytes = int(offsets[-1]) - int(offsets[0])
    if kind is ShardKind.BYTES:
        return num_bytes, None
    check_patches(batch)
    offsets, _ = column_buffers(batch.column(PATCH_LENGTHS))
    return num_bytes, int(offsets[-1]) - int(offsets[0])


def _record_batch(
    kind: ShardKind,
    document_ids: Sequence[str] | pa.Array,
    contents: Sequence[bytes] | pa.Array,
    sources: Sequence[str] | pa.Array,
    patch_lengths: pa.Array | None,
    entropies: pa.Array | None,
) -> pa.RecordBatch:
    if (kind is ShardKind.PATCHED) != (patch_lengths is not None):
        raise ValueError(f"a shard of kind {kind} {'has no' if patch_lengths is not None else 'needs'} patch lengths")
    if kind is ShardKind.BYTES and entropies is not None:
        raise ValueError("a byte shard has no entropies; write a patched shard")
    schema = shard_schema(kind, entropies=entropies is not None)
    given = [document_ids, contents, sources, patch_lengths, entropies]
    columns = []
    for field, values in zip(schema, [value for value in given if value is not None], strict=True):
        column = _one_array(values, field.type)
        if len(column) != len(contents):
            raise ValueError(f"{len(contents)} documents, but {len(column)} values of {field.name}")
        if column.null_count:
            raise ValueError(f"{field.name} has {column.null_count} nulls; a shard has none")
        columns.append(column)
    return pa.record_batch(columns, schema=schema)


def _one_array(values: Sequence[object] | pa.Array, kind: pa.DataType) -> pa.Array:
    """Return values as one Arrow array of a type."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        if pa.types.is_dictionary(kind):
            return pa.array(values, pa.string()).dictionary_encode()
        return pa.array(values, kind)
    if pa.types.is_dictionary(kind) and not pa.types.is_dictionary(values.type):
        return values.cast(pa.string()).dictionary_encode()
    return values if values.type == kind else values.cast(kind)


def check_patches(batch: pa.RecordBatch) -> None:
    """Check that every document's patch lengths and entropies cover its framed tokens.

    Raises:
        ValueError: they do not, for the row that the message names (from 0).
    """
    content_offsets, _ = column_buffers(batch.column(CONTENT))
    tokens = np.diff(content_offsets).astype(np.int64) + FRAME_TOKENS
    offsets, lengths = column_buffers(batch.column(PATCH_LENGTHS))
    covered = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])[offsets]
    _check_rows(np.diff(covered) == tokens, "patch lengths do not sum to its framed tokens (bytes + 2)")
    used = lengths[int(offsets[0]) : int(offsets[-1])]
    # A sum of at least 2 means that no document is without a patch, so each has a first one.
    _check_rows(lengths[offsets[:-1]] == 1, "first patch is not BOS alone")
    if used.size and int(used.min()) == 0:
        row = int(np.searchsorted(offsets, int(offsets[0]) + int(np.argmin(used)), side="right")) - 1
        raise ValueError(f"row {row}: a patch has no token")
    if ENTROPIES in batch.schema.names:
        entropy_offsets, _ = column_buffers(batch.column(ENTROPIES))
        _check_rows(np.diff(entropy_offsets) == tokens, "entropies are not one per framed token (bytes + 2)")


def _check_rows(good: npt.NDArray[np.bool_], problem: str) -> None:
    if not bool(good.all()):
        raise ValueError(f"row {int(np.argmin(good))}: its {problem}")
