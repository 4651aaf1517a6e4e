"""Parquet: one document a row, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from blt_data.columns import check_id_column, check_text_column
from blt_data.documents import BATCH_BYTES, DocumentBatch
from blt_data.readers.columnar import documents_of
from blt_data.readers.context import Context
from blt_data.readers.damage import DAMAGE, unreadable

_MAX_ROWS: Final = 1 << 14


def read_parquet(context: Context) -> Iterator[DocumentBatch]:
    """Yield the documents of a Parquet file, or of some of its row groups.

    Args:
        context: the unit.

    Raises:
        ColumnError: the file has no such column.
        InputError: the file is damaged or has a bad row, and that is to fail.
        OSError: the file cannot be read.
    """
    try:
        yield from _read(context, context.opened.open(context.file))
    except BaseException as error:
        # What failed once is opened anew, should it be asked for again.
        context.opened.close()
        if isinstance(error, DAMAGE):
            raise unreadable(context.file, "Parquet file", error) from error
        raise


def _read(context: Context, parquet: pq.ParquetFile) -> Iterator[DocumentBatch]:
    unit, reading = context.unit, context.reading
    schema, metadata = parquet.schema_arrow, parquet.metadata
    check_text_column(context.file.location, schema, reading.text_column)
    check_id_column(context.file.location, schema, reading.id_column)
    columns = [reading.text_column, *([reading.id_column] if reading.id_column in schema.names else [])]
    groups = list(range(*(unit.row_groups or (0, metadata.num_row_groups))))
    num_rows = sum(metadata.row_group(group).num_rows for group in groups)
    sizes = text_bytes(metadata, reading.text_column)
    size = sum(sizes[group] for group in groups)
    rows_per_batch = max(1, min(_MAX_ROWS, num_rows * BATCH_BYTES // max(1, size)))
    row, told = unit.first_row, 0
    for batch in parquet.iter_batches(rows_per_batch, row_groups=groups, columns=columns, use_threads=False):
        yield from documents_of(context, batch, row)
        row += batch.num_rows
        share = unit.weight * (row - unit.first_row) // max(1, num_rows)
        context.advance(share - told)
        told = share
    if row - unit.first_row != num_rows:
        raise pa.ArrowInvalid(f"{row - unit.first_row:,} rows where its footer says {num_rows:,}")


def text_bytes(metadata: pq.FileMetaData, column: str) -> list[int]:
    """Return the bytes of text in each row group, as the footer tells them.

    Args:
        metadata: the file's footer.
        column: name of the column, which must be there.
    """
    paths = (metadata.schema.column(index).path for index in range(metadata.num_columns))
    index = next((index for index, path in enumerate(paths) if path == column), None)
    if index is None:
        raise pa.ArrowInvalid(f"its footer has no column {column!r}, its schema has")
    groups = (metadata.row_group(group).column(index) for group in range(metadata.num_row_groups))
    return [max(0, int(chunk.total_uncompressed_size)) for chunk in groups]
