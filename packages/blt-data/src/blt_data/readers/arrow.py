"""Arrow's IPC formats, file and stream: one document a row, record batch by record batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO, Any, Final

import pyarrow as pa

from blt_data.columns import check_id_column, check_text_column, is_textual
from blt_data.documents import DocumentBatch
from blt_data.readers.columnar import documents_of
from blt_data.readers.context import Context
from blt_data.readers.damage import DAMAGE, unreadable
from blt_data.shards.schema import CONTENT, DOCUMENT_ID
from blt_data.sources import open_file

_FILE_MAGIC: Final = b"ARROW1"

_BYTES: Final[Mapping[pa.DataType, pa.DataType]] = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def read_arrow(context: Context) -> Iterator[DocumentBatch]:
    """Yield the documents of an Arrow IPC file or stream.

    Shards of this package are such files; where the named columns are missing, theirs are taken.

    Args:
        context: the unit, a whole file.

    Raises:
        ColumnError: the file has no such column.
        InputError: the file is damaged or has a bad row, and that is to fail.
        OSError: the file cannot be read.
    """
    try:
        with open_file(context.file) as raw:
            yield from _read(context, raw)
    except DAMAGE as error:
        raise unreadable(context.file, "Arrow file", error) from error


def _read(context: Context, raw: IO[bytes] | Any) -> Iterator[DocumentBatch]:
    open_ipc = pa.ipc.open_file if raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC else pa.ipc.open_stream
    raw.seek(0)
    schema = open_ipc(raw).schema
    columns = _columns(context, schema)
    raw.seek(0)
    # Only these columns are read and decompressed.
    reader = open_ipc(raw, options=pa.ipc.IpcReadOptions(included_fields=sorted(columns)))
    row = told = 0
    for batch in _batches(reader):
        chosen = pa.RecordBatch.from_arrays(
            [_as_bytes(batch.column(schema.field(index).name)) for index in columns], names=list(columns.values())
        )
        # Unlike those of Parquet, Arrow's buffers are taken as they are: offsets could point anywhere.
        chosen.validate(full=True)
        yield from documents_of(context, chosen, row)
        row += batch.num_rows
        position = min(raw.tell(), context.file.size)
        context.advance(max(0, position - told))
        told = max(told, position)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Return strings as bytes, so that one value which is no UTF-8 does not spoil the others."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary), safe=True)
    return column.view(_BYTES[kind]) if kind in _BYTES else column


def _batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from reader


def _columns(context: Context, schema: pa.Schema) -> dict[int, str]:
    """Return index of the text column, and of the id column where there is one, to what they are called.

    Raises:
        ColumnError: there is no text column.
    """
    text, name = context.reading.text_column, context.reading.id_column
    names = schema.names
    ours = names.count(CONTENT) == names.count(DOCUMENT_ID) == 1
    if ours and text not in names and is_textual(schema.field(CONTENT).type):
        return {names.index(CONTENT): text, names.index(DOCUMENT_ID): name}
    check_text_column(context.file.location, schema, text)
    check_id_column(context.file.location, schema, name)
    return {names.index(column): column for column in (text, name) if column in names}
