"""Finding one document of a shard directory by its id."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from blt_data import ShardDirectory
from blt_data.errors import InputError
from blt_data.shards.schema import DOCUMENT_ID


def find_document(directory: ShardDirectory, document_id: str | None) -> tuple[int, int]:
    """Return the shard and the row of a document.

    Args:
        directory: byte or patched shards.
        document_id: its id; of several that have it the first is taken. None takes the first document of all.

    Raises:
        InputError: there is no such document, or none at all.
    """
    filled = [index for index, entry in enumerate(directory.manifest.shards) if entry.documents]
    if not filled:
        raise InputError(f"{directory.path}: holds no document to show; prepare some data first")
    if document_id is None:
        return filled[0], 0
    wanted = pa.scalar(document_id, pa.string())
    for index in filled:
        row = pc.index(directory.shard(index).batch.column(DOCUMENT_ID), wanted).as_py()
        if row >= 0:
            return index, row
    first, last = directory.shard(filled[0]), directory.shard(filled[-1])
    raise InputError(
        f"{directory.path}: has no document {document_id!r}; its ids are like {first.document_id(0)!r} and "
        f"{last.document_id(last.num_documents - 1)!r}"
    )
