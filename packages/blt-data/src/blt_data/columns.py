"""Which column holds the text, and what to say where none does."""

from __future__ import annotations

import pyarrow as pa

from blt_data.errors import SetupError


class ColumnError(SetupError):
    """The named column is not there, or holds no text."""


def check_text_column(location: str, schema: pa.Schema, name: str) -> None:
    """Refuse a file without usable text.

    Args:
        location: the file, for the message.
        schema: its columns.
        name: column that should hold the text.

    Raises:
        ColumnError: there is no such column, there are several, or its values are no strings.
    """
    if name not in schema.names:
        raise ColumnError(
            f"{location}: has no column {name!r} (it has {', '.join(map(repr, schema.names)) or 'none'}); "
            "name the one that holds the text with --text-column"
        )
    if schema.names.count(name) > 1:
        raise ColumnError(f"{location}: has {schema.names.count(name)} columns {name!r}; rename all but one")
    kind = schema.field(name).type
    if not is_textual(kind):
        raise ColumnError(
            f"{location}: column {name!r} has type {kind}, text must be strings; name another with --text-column"
        )


def check_id_column(location: str, schema: pa.Schema, name: str) -> None:
    """Refuse a column of ids that are neither strings nor integers; having none at all is fine.

    Args:
        location: the file, for the message.
        schema: its columns.
        name: column that may hold the ids.

    Raises:
        ColumnError: there are several such columns, or the values are of another kind.
    """
    if schema.names.count(name) > 1:
        raise ColumnError(f"{location}: has {schema.names.count(name)} columns {name!r}; rename all but one")
    if name not in schema.names:
        return
    kind = schema.field(name).type
    if not (is_textual(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise ColumnError(
            f"{location}: column {name!r} has type {kind}, an id must be a string or an integer; "
            "name another column with --id-column"
        )


def is_textual(kind: pa.DataType) -> bool:
    """Return whether values of an Arrow type are strings, or bytes that may be UTF-8.

    Args:
        kind: the type; of a dictionary, that of its values counts.
    """
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
        or pa.types.is_binary(value)
        or pa.types.is_large_binary(value)
        or pa.types.is_binary_view(value)
    )
