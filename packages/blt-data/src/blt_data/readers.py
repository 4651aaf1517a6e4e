"""Documents out of source files, one at a time, nothing altered and nothing dropped.

Every reader yields (document id, text) in the file's order. The text's UTF-8 is exactly that of the source. What
cannot be read is an `InputError` that names file and row, counted from 1 as editors do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from blt_data.errors import InputError
from blt_data.plan import Unit, is_textual
from blt_data.sample import UNDECODABLE, decode_python
from blt_data.sources import Format, SourceFile, unreadable

#: (document id, text)
Record: TypeAlias = tuple[str, str]
#: Is told how many bytes of the source file have been read since the last call.
Advance: TypeAlias = Callable[[int], None]

_CHUNK: Final = 4 << 20
_BOM: Final = b"\xef\xbb\xbf"


def read_unit(
    unit: Unit, *, text_column: str, id_column: str, advance: Advance, skip: Callable[[str], None]
) -> Iterator[Record]:
    """Yield the documents of a unit.

    Args:
        unit: a file, or some row groups of a Parquet file.
        text_column: column or key that holds the text.
        id_column: column or key that holds the id; where it is missing, null or empty, `path#row` serves.
        advance: told of the unit's weight as it is consumed.
        skip: told the reason for each document left out.

    Raises:
        InputError: the file is damaged, or holds something that is no document.
        OSError: the file cannot be opened.
    """
    match unit.file.format:
        case Format.PARQUET:
            return _read_parquet(unit, text_column, id_column, advance)
        case Format.JSON_LINES:
            return _read_json_lines(unit.file, text_column, id_column, advance)
        case Format.TEXT:
            return _read_text(unit.file, advance)
        case Format.PYTHON:
            return _read_python(unit.file, advance, skip)


def _read_parquet(unit: Unit, text_column: str, id_column: str, advance: Advance) -> Iterator[Record]:
    file, path = unit.file, unit.file.path
    try:
        # Few writers put checksums into pages; where there are some, damage does not get past them.
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            columns = [text_column, *([id_column] if id_column in parquet.schema_arrow.names else [])]
            groups = list(range(*unit.row_groups))
            num_rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
            row, told = unit.first_row, 0
            rows_per_batch = max(1, min(1000, num_rows * _CHUNK // max(1, unit.weight)))
            for batch in parquet.iter_batches(rows_per_batch, row_groups=groups, columns=columns):
                texts = _strings(batch.column(text_column), file, text_column, row)
                ids = _ids(batch.column(id_column), file, id_column, row) if len(columns) > 1 else [None] * len(texts)
                for index, (name, text) in enumerate(zip(ids, texts, strict=True), start=row + 1):
                    if text is None:
                        raise InputError(
                            f"{path}: row {index} has no text ({text_column!r} is null); "
                            "remove the row or name another column with --text-column"
                        )
                    yield name or f"{file.relative}#{index}", text
                row += batch.num_rows
                share = unit.weight * (row - unit.first_row) // max(1, num_rows)
                advance(share - told)
                told = share
            if row - unit.first_row != num_rows:
                raise pa.ArrowInvalid(f"{row - unit.first_row:,} rows where its footer says {num_rows:,}")
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, "Parquet file", error) from error


def _strings(column: pa.Array, file: SourceFile, name: str, first_row: int) -> list[str | None]:
    """Return the values of a string or binary column, finding the row that is no UTF-8."""
    try:
        values: list[str | bytes | None] = column.to_pylist()
        return [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError:
        for index, value in enumerate(column, start=first_row + 1):
            _decode_value(value, file, index, name)
        raise


def _decode_value(value: pa.Scalar, file: SourceFile, row: int, name: str) -> None:
    try:
        text = value.as_py()
        if isinstance(text, bytes):
            text.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file.path}: row {row}: its {name!r} is no UTF-8 (byte {error.start + 1}); mend or remove the row"
        ) from error


def _ids(column: pa.Array, file: SourceFile, name: str, first_row: int) -> list[str | None]:
    if pa.types.is_integer(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.string())
    elif not is_textual(column.type):
        raise InputError(
            f"{file.path}: column {name!r} has type {column.type}, an id must be a string or an integer; "
            "name another column with --id-column"
        )
    return _strings(column, file, name, first_row)


def _read_json_lines(file: SourceFile, text_column: str, id_column: str, advance: Advance) -> Iterator[Record]:
    for row, line in enumerate(_lines(file, advance), start=1):
        # A blank line holds no record: writers leave them at the end.
        if not line or line.isspace():
            continue
        record = _parse(line, file, row, (text_column, id_column))
        text = record.get(text_column)
        if not isinstance(text, str):
            raise _no_text(record, text_column, file, row)
        name = record.get(id_column)
        if name is None or name == "":
            name = f"{file.relative}#{row}"
        elif isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        elif not isinstance(name, str):
            raise InputError(
                f"{file.path}: line {row}: its {id_column!r} is {_kind(name)}, an id must be a string or an integer; "
                "name another key with --id-column"
            )
        yield name, text


def _parse(line: bytes, file: SourceFile, row: int, keys: tuple[str, str]) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_leniently(line, file, row, keys)
    if not isinstance(record, dict):
        raise InputError(
            f"{file.path}: line {row} is {_kind(record)}, not a JSON object; each line must be one object with a text"
        )
    return record


def _parse_leniently(line: bytes, file: SourceFile, row: int, keys: tuple[str, str]) -> object:
    """Parse what the fast parser refuses: NaN and huge numbers are fine beside the text; say what is not."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file.path}: line {row} is no UTF-8 (byte {error.start + 1} of the line); mend or remove the line"
        ) from error
    except json.JSONDecodeError as error:
        # Its own text counts lines within the line.
        reason = f"{error.msg} at character {error.pos + 1}"
        raise InputError(f"{file.path}: line {row} is no JSON ({reason}); mend or remove the line") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.path}: line {row} is no JSON ({error}); mend or remove the line") from error
    for key in keys:
        value = record.get(key) if isinstance(record, dict) else None
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{file.path}: line {row} has a lone surrogate (\\u{ord(error.object[error.start]):04x}), which is "
                "no character and has no UTF-8; mend or remove the line"
            ) from error
    return record


def _no_text(record: dict[str, Any], text_column: str, file: SourceFile, row: int) -> InputError:
    if text_column in record:
        problem = f"{text_column!r} is {_kind(record[text_column])}, not a string"
    else:
        problem = f"no {text_column!r} among its keys {', '.join(map(repr, list(record)[:12])) or '(none)'}"
    return InputError(
        f"{file.path}: line {row} has no text: {problem}; remove the line or name the text with --text-column"
    )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {bool: "true or false", str: "a string", list: "a list", dict: "an object"}.get(type(value), "a number")


def _lines(file: SourceFile, advance: Advance) -> Iterator[bytes]:
    """Yield lines without their line feed; nothing else (CR, U+2028) ends a line."""
    pieces: list[bytes] = []
    first = True
    for chunk in _chunks(file, advance):
        block = chunk.removeprefix(_BOM) if first else chunk
        first = False
        head, *rest = block.split(b"\n")
        pieces.append(head)
        if rest:
            yield b"".join(pieces)
            yield from rest[:-1]
            pieces = [rest[-1]]
    if last := b"".join(pieces):
        yield last


def _chunks(file: SourceFile, advance: Advance) -> Iterator[bytes]:
    """Yield a file's bytes, decompressed, a few megabytes at a time."""
    with file.path.open("rb") as raw:
        if file.compression is None:
            while chunk := raw.read(_CHUNK):
                yield chunk
                advance(len(chunk))
            return
        if not file.size:
            # Even nothing, compressed, is some bytes; Arrow takes no bytes for nothing.
            raise unreadable(file, f"{file.compression} file", pa.ArrowInvalid("it is empty"))
        told = 0
        try:
            # Arrow's stream, unlike Python's zstandard, knows a truncated file from a whole one.
            with pa.CompressedInputStream(raw, file.compression) as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
                    position = raw.tell()
                    advance(position - told)
                    told = position
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file, f"{file.compression} file", error) from error


def _read_text(file: SourceFile, advance: Advance) -> Iterator[Record]:
    data = b"".join(_chunks(file, advance))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file.path}: line {row} is no UTF-8 (byte {error.start + 1} of the file); convert the file with iconv"
        ) from error
    yield file.relative, text


def _read_python(file: SourceFile, advance: Advance, skip: Callable[[str], None]) -> Iterator[Record]:
    text = decode_python(b"".join(_chunks(file, advance)))
    if text is None:
        skip(UNDECODABLE)
    else:
        yield file.relative, text
