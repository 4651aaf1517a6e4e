"""Reading one shard: memory-mapped, its columns as NumPy arrays without a copy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt_data.errors import InputError
from blt_data.shards.files import file_crc32
from blt_data.shards.manifest import ShardEntry
from blt_data.shards.schema import (
    CONTENT,
    DOCUMENT_ID,
    ENTROPIES,
    FORMAT_NAME,
    FORMAT_VERSION,
    JSON,
    PATCH_LENGTHS,
    SOURCE,
    ShardKind,
    column_buffers,
    payload_sha256,
    shard_schema,
)
from blt_data.shards.writer import check_patches

#: What to do about a damaged shard.
SHARD_MEND: Final = "delete it and run the command that wrote it again"


class Shard:
    """One shard, open for reading; use `Shard.open`.

    The file holds exactly one record batch, so each column is one contiguous run of memory. Arrays are read-only views
    of the mapped file (of decompressed memory where the file is compressed) and stay valid as long as they are held.
    """

    def __init__(self, path: Path, batch: pa.RecordBatch) -> None:
        metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
        self.path = path
        self.batch = batch
        self.kind = ShardKind(metadata["blt.kind"])
        self.payload_sha256 = metadata["blt.payload_sha256"]
        self.provenance: dict[str, JSON] = json.loads(metadata["blt.provenance"])
        self.num_documents: int = batch.num_rows
        self.has_entropies: bool = ENTROPIES in batch.schema.names
        self._content = _offsets_and_values(batch.column(CONTENT))
        self._patches = _offsets_and_values(batch.column(PATCH_LENGTHS)) if self.kind is ShardKind.PATCHED else None
        self._entropies = _offsets_and_values(batch.column(ENTROPIES)) if self.has_entropies else None
        self.num_bytes = int(self._content[0][-1])
        self.num_patches = int(self._patches[0][-1]) if self._patches is not None else None
        declared = [metadata["blt.documents"], metadata["blt.bytes"], metadata.get("blt.patches", "None")]
        if declared != [str(self.num_documents), str(self.num_bytes), str(self.num_patches)]:
            raise ValueError("its figures do not agree with its columns")

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Self:
        """Open a shard.

        Format, version, columns and figures are always checked, in time that does not depend on the content's size.

        Args:
            path: the file, on a local file system.
            verify: also recompute the checksum of the payload, and check that UTF-8 is valid and that patches cover
                their documents. Reads the whole file.

        Raises:
            InputError: the file is missing, damaged, or no shard of this version.
        """
        file = Path(path)
        batch = _read_batch(file)
        try:
            shard = cls(file, batch)
            if verify:
                batch.validate(full=True)
                if payload_sha256(batch) != shard.payload_sha256:
                    raise ValueError("its content does not have the checksum that it names")
                if shard.kind is ShardKind.PATCHED:
                    check_patches(batch)
        except (KeyError, ValueError, pa.ArrowException) as error:
            raise InputError(f"{file}: is a damaged shard ({_brief(error)}); {SHARD_MEND}") from error
        return shard

    def __len__(self) -> int:
        return self.num_documents

    def __reduce__(self) -> tuple[object, ...]:
        # Another process maps the file again; the content itself is never pickled.
        return type(self).open, (self.path,)

    def document_id(self, index: int) -> str:
        """Return the id of document `index`."""
        return str(self.batch.column(DOCUMENT_ID)[index].as_py())

    def source(self, index: int) -> str:
        """Return the name of the source of document `index`."""
        return str(self.batch.column(SOURCE)[index].as_py())

    def content(self, index: int) -> npt.NDArray[np.uint8]:
        """Return the raw bytes of document `index`: uint8 [N], a view."""
        offsets, values = self._content
        return values[offsets[index] : offsets[index + 1]]

    def content_column(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Return offsets int64 [n + 1] (from 0) and the bytes of all documents, uint8; views."""
        return self._content

    def patch_lengths(self, index: int) -> npt.NDArray[np.uint16]:
        """Return the patch lengths of document `index` in framed tokens: uint16 [P], a view.

        Raises:
            InputError: this is a byte shard.
        """
        offsets, values = self.patch_column()
        return values[offsets[index] : offsets[index + 1]]

    def patch_column(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
        """Return offsets int64 [n + 1] (from 0) and all patch lengths, uint16 (a view).

        Raises:
            InputError: this is a byte shard.
        """
        if self._patches is None:
            raise InputError(f"{self.path}: is a byte shard without patches; run blt-patch precompute on its directory")
        return self._patches

    def entropies(self, index: int) -> npt.NDArray[np.float16]:
        """Return the entropies of document `index` in nats, one per framed token: float16 [N + 2], a view.

        Raises:
            InputError: this shard keeps no entropies.
        """
        offsets, values = self.entropy_column()
        return values[offsets[index] : offsets[index + 1]]

    def entropy_column(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
        """Return offsets int64 [n + 1] (from 0) and all entropies in nats, float16 (a view).

        Raises:
            InputError: this shard keeps no entropies.
        """
        if self._entropies is None:
            raise InputError(f"{self.path}: keeps no entropies; run blt-patch precompute with --entropies float16")
        return self._entropies


def entry_of_finished_shard(path: str | os.PathLike[str]) -> ShardEntry | None:
    """Return the manifest entry of a shard that an earlier run finished, or None if it is missing or damaged.

    Reads the whole file: nothing but its own checksum tells that it is whole.

    Args:
        path: where the shard would be.
    """
    file = Path(path)
    if not file.exists():
        return None
    try:
        shard = Shard.open(file, verify=True)
    except InputError:
        return None
    return ShardEntry(
        name=file.name,
        documents=shard.num_documents,
        bytes=shard.num_bytes,
        patches=shard.num_patches,
        entropies=shard.has_entropies,
        payload_sha256=shard.payload_sha256,
        file_bytes=file.stat().st_size,
        file_crc32=file_crc32(file),
    )


def _read_batch(file: Path) -> pa.RecordBatch:
    """Return the one record batch of a file after checking that it is a shard of this version."""
    if file.is_dir():
        raise InputError(f"{file}: is a directory, not a shard")
    try:
        buffer = _map(file)
    except FileNotFoundError:
        raise InputError(f"{file}: no such shard; run the command that writes its directory again") from None
    try:
        reader = pa.ipc.open_file(pa.BufferReader(buffer))
        metadata = reader.schema.metadata or {}
    except (pa.ArrowException, ValueError, OSError) as error:
        raise InputError(f"{file}: is no Arrow file, or a truncated one ({_brief(error)}); {SHARD_MEND}") from error
    if metadata.get(b"blt.format") != FORMAT_NAME.encode():
        raise InputError(f"{file}: is an Arrow file but no shard; make shards with blt-data prepare")
    version = metadata.get(b"blt.version", b"").decode(errors="replace")
    if version != str(FORMAT_VERSION):
        raise InputError(
            f"{file}: has shard format version {version}, this program reads version {FORMAT_VERSION}; "
            "update blt-data or prepare the data again"
        )
    try:
        kind = ShardKind(metadata.get(b"blt.kind", b"").decode(errors="replace"))
        if not reader.schema.equals(shard_schema(kind, entropies=ENTROPIES in reader.schema.names)):
            raise ValueError(f"its columns are not those of a shard of kind {kind}")
        if reader.num_record_batches != 1:
            raise ValueError(f"it has {reader.num_record_batches} record batches, a shard has one")
        batch = reader.get_batch(0)
        batch.validate()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise InputError(f"{file}: is a damaged shard ({_brief(error)}); {SHARD_MEND}") from error
    return batch


def _map(file: Path) -> pa.Buffer:
    """Map a file into memory; Arrow maps no empty file."""
    if file.stat().st_size == 0:
        return pa.py_buffer(b"")
    # As bytes, since a name need not be UTF-8. Closing the map closes its file descriptor; the mapping itself lives as
    # long as the buffer.
    with pa.memory_map(os.fsencode(file)) as mapped:
        return mapped.read_buffer()


def _offsets_and_values(column: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    offsets, values = column_buffers(column)
    if column.null_count or int(offsets[0]) != 0 or int(offsets[-1]) > len(values) or np.any(np.diff(offsets) < 0):
        raise ValueError("its offsets are not in order")
    return offsets.astype(np.int64, copy=False), values[: int(offsets[-1])]


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
