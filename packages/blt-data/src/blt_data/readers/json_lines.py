"""JSON lines: one document a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa

from blt_data.documents import BATCH_BYTES, DocumentBatch
from blt_data.errors import InputError
from blt_data.readers.context import Context
from blt_data.readers.reasons import BAD_ID, NO_JSON, NO_TEXT, NO_UTF8
from blt_data.readers.streams import chunks_of

_BOM: Final = b"\xef\xbb\xbf"


class BadLineError(Exception):
    """A line that is no document; becomes an `InputError` with the file's name."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


def read_json_lines(context: Context) -> Iterator[DocumentBatch]:
    """Yield the documents of a file of JSON lines.

    Nothing but a line feed ends a line. Blank lines hold no document: writers leave them at the end. What the fast
    parser refuses beside the text (NaN, numbers beyond 64 bits) is read by Python's.

    Args:
        context: the unit.

    Raises:
        InputError: the file is damaged or a line is no document, and that is to fail.
        OSError: the file cannot be read.
    """
    text_path, id_path = context.reading.text_column, context.reading.id_column
    rows, names, texts, size = list[int](), list[str](), list[str](), 0
    prefix = f"{context.file.relative}#"
    for row, line in enumerate(_lines(context), start=1):
        if not line or line.isspace():
            continue
        try:
            record = _parse(line, (text_path, id_path))
            text = record.get(text_path)
            if not isinstance(text, str):
                text = _nested_text(record, text_path)
            name = record.get(id_path)
            if type(name) is not str or not name:
                name = _name(record, id_path) or f"{prefix}{row}"
        except BadLineError as error:
            sentence = InputError(f"{context.file.location}: line {row} {error}")
            context.policy.bad(sentence, error.reason, len(line))
            continue
        if rows and size + len(line) > BATCH_BYTES:
            yield from _batches(context, rows, names, texts)
            rows, names, texts, size = [], [], [], 0
        rows.append(row)
        names.append(name)
        texts.append(text)
        size += len(line)
    if rows:
        yield from _batches(context, rows, names, texts)


def _batches(context: Context, rows: list[int], names: list[str], texts: list[str]) -> Iterator[DocumentBatch]:
    contents = pa.array(texts, pa.large_string()).view(pa.large_binary())
    return context.batches(np.array(rows, np.int64), pa.array(names, pa.string()), contents)


def _parse(line: bytes, paths: tuple[str, str]) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_leniently(line, paths)
    if not isinstance(record, dict):
        raise BadLineError(NO_JSON, f"is {_kind(record)}, not a JSON object; each line must be one object with a text")
    return record


def _parse_leniently(line: bytes, paths: tuple[str, str]) -> object:
    """Parse what the fast parser refuses: NaN and huge numbers are fine beside the text; say what is not."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadLineError(
            NO_UTF8, f"is no UTF-8 (byte {error.start + 1} of the line); mend or remove the line"
        ) from error
    except json.JSONDecodeError as error:
        # Its own text counts lines within the line.
        reason = f"{error.msg} at character {error.pos + 1}"
        raise BadLineError(NO_JSON, f"is no JSON ({reason}); mend or remove the line") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(NO_JSON, f"is no JSON ({error}); mend or remove the line") from error
    for path in paths:
        value = _at(record, path) if isinstance(record, dict) else None
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as error:
            raise BadLineError(
                NO_UTF8,
                f"has a lone surrogate (\\u{ord(error.object[error.start]):04x}), which is "
                "no character and has no UTF-8; mend or remove the line",
            ) from error
    return record


def _at(record: Mapping[str, Any], path: str) -> object:
    """Return the value under a key, or under a path `a.b` of keys where no key is called that."""
    if path in record:
        return record[path]
    head, dot, rest = path.partition(".")
    inner = record.get(head) if dot else None
    return _at(inner, rest) if isinstance(inner, dict) else None


def _nested_text(record: dict[str, Any], path: str) -> str:
    text = _at(record, path)
    if isinstance(text, str):
        return text
    if path in record or text is not None:
        problem = f"{path!r} is {_kind(text)}, not a string"
    else:
        problem = f"no {path!r} among its keys {', '.join(map(repr, list(record)[:12])) or '(none)'}"
    raise BadLineError(NO_TEXT, f"has no text: {problem}; remove the line or name the text with --text-column")


def _name(record: dict[str, Any], path: str) -> str | None:
    name = _at(record, path)
    if name is None or isinstance(name, str):
        return name
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    raise BadLineError(
        BAD_ID,
        f"has an unusable id: {path!r} is {_kind(name)}, an id must be a string or an integer; "
        "name another key with --id-column",
    )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {bool: "true or false", str: "a string", list: "a list", dict: "an object"}.get(type(value), "a number")


def _lines(context: Context) -> Iterator[bytes]:
    """Yield lines without their line feed; nothing else (CR, U+2028) ends a line."""
    pieces: list[bytes] = []
    first = True
    for chunk in chunks_of(context):
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
