"""Columns of Arrow record batches to documents: by Arrow's kernels, row by row only where a row is bad."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from blt_data.documents import DocumentBatch
from blt_data.errors import InputError
from blt_data.readers.context import Context
from blt_data.readers.reasons import NO_TEXT, NO_UTF8


def documents_of(context: Context, columns: pa.RecordBatch, first_row: int) -> Iterator[DocumentBatch]:
    """Yield the documents of a record batch.

    Args:
        context: the unit being read.
        columns: n rows, with the text column, and with the id column where there is one.
        first_row: rows of the file before these.

    Raises:
        InputError: a row has no text, or one that is no UTF-8, and that is to fail.
    """
    reading = context.reading
    text = columns.column(reading.text_column)
    contents, bad_text = _utf8(text)
    ids = columns.column(reading.id_column) if reading.id_column in columns.schema.names else None
    names, bad_ids = (None, None) if ids is None else _utf8(_as_text(ids))
    rows = np.arange(first_row + 1, first_row + columns.num_rows + 1, dtype=np.int64)
    good = _good_rows(context, contents, bad_text, bad_ids, rows)
    if good is not None:
        mask = pa.array(good)
        rows, contents = rows[good], contents.filter(mask)
        names = None if names is None else names.filter(mask)
    if len(rows):
        yield from context.batches(rows, _document_ids(context, names, rows), contents)


def _as_text(ids: pa.Array) -> pa.Array:
    return ids.cast(pa.string()) if pa.types.is_integer(ids.type) or pa.types.is_null(ids.type) else ids


def _utf8(column: pa.Array) -> tuple[pa.LargeBinaryArray, npt.NDArray[np.bool_] | None]:
    """Return a column's bytes as large_binary [n], and a mask of the values that are no UTF-8 where there are any."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # Arrow reads strings without looking whether they are UTF-8; as bytes they can be looked at.
    data = column.cast(pa.large_binary())
    try:
        data.cast(pa.large_string())
    except pa.ArrowInvalid:
        return data, np.fromiter((not _is_utf8(value) for value in data), bool, len(data))
    return data, None


def _is_utf8(value: pa.Scalar) -> bool:
    return _utf8_error(value) is None


def _utf8_error(value: pa.Scalar) -> UnicodeDecodeError | None:
    try:
        if value.is_valid:
            value.as_py().decode()
    except UnicodeDecodeError as error:
        return error
    return None


def _good_rows(
    context: Context,
    contents: pa.LargeBinaryArray,
    bad_text: npt.NDArray[np.bool_] | None,
    bad_ids: npt.NDArray[np.bool_] | None,
    rows: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_] | None:
    """Deal with the bad rows and return a mask of the good ones, or None if all are good."""
    nulls = contents.is_null().to_numpy(zero_copy_only=False) if contents.null_count else None
    masks = [mask for mask in (nulls, bad_text, bad_ids) if mask is not None]
    if not masks:
        return None
    bad: npt.NDArray[np.bool_] = np.logical_or.reduce(masks)
    location, reading = context.file.location, context.reading
    for index in np.flatnonzero(bad).tolist():
        row, value = int(rows[index]), contents[index]
        if not value.is_valid:
            error = InputError(
                f"{location}: row {row} has no text ({reading.text_column!r} is null); "
                "remove the row or name another column with --text-column"
            )
            context.policy.bad(error, NO_TEXT, 0)
            continue
        failure = _utf8_error(value)
        where = f" (byte {failure.start + 1})" if failure is not None else ""
        column = reading.text_column if failure is not None else reading.id_column
        error = InputError(f"{location}: row {row}: its {column!r} is no UTF-8{where}; mend or remove the row")
        context.policy.bad(error, NO_UTF8, len(value.as_py()))
    return ~bad


def _document_ids(context: Context, names: pa.LargeBinaryArray | None, rows: npt.NDArray[np.int64]) -> pa.StringArray:
    """Return string [n]: the given names, and `path#row` where there is none or an empty one."""
    if names is not None:
        given = names.cast(pa.large_string()).cast(pa.string())
        empty = pc.equal(pc.binary_length(given), 0).fill_null(True)
        if not pc.any(empty).as_py():
            return given
        return pc.if_else(empty, numbered(context.file.relative, rows), given)
    return numbered(context.file.relative, rows)


def numbered(relative: str, rows: npt.NDArray[np.int64]) -> pa.StringArray:
    """Return string [n]: `path#row` for each row.

    Args:
        relative: the file's relative path.
        rows: int64 [n], counted from 1.
    """
    return pc.binary_join_element_wise(f"{relative}#", pa.array(rows).cast(pa.string()), "")
