"""The plan of a run: source files cut into tasks, the same for every number of workers.

A task is a run of consecutive units (a file, or one row group of a Parquet file) of a few shards. Its key is a
checksum of all that decides its output, so that a resumed run takes over exactly the tasks that would come out equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from blt_data.errors import InputError
from blt_data.shards.schema import JSON, canonical_json
from blt_data.sources import Format, Source, SourceFile, unreadable


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What is read in one go."""

    file: SourceFile
    weight: int
    """Bytes to read, as near as the file tells without reading it."""
    row_groups: tuple[int, int] = (0, 0)
    """First and one past the last row group of a Parquet file."""
    first_row: int = 0
    """Rows of the file before this unit."""

    def identity(self) -> JSON:
        """Return what decides this unit's documents."""
        file = self.file
        return [str(file.format), file.relative, file.size, file.modified_ns, *self.row_groups]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Units that one process reads and writes to shards of their own."""

    units: tuple[Unit, ...]
    key: str

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return sum(unit.weight for unit in self.units)


def plan_tasks(source: Source, *, task_bytes: int | None, text_column: str, context: Mapping[str, JSON]) -> list[Task]:
    """Cut a source into tasks.

    Args:
        source: the files.
        task_bytes: weight at which a task is full; None makes one task of everything, as a limit on the total of
            bytes needs.
        text_column: column that Parquet files must have.
        context: everything else that decides the output; part of each task's key.

    Raises:
        InputError: a Parquet file is damaged or has no such column.
    """
    tasks, units, weight = [], list[Unit](), 0
    for unit in (unit for file in source.files for unit in _units(file, text_column)):
        if units and task_bytes is not None and weight + unit.weight > task_bytes:
            tasks.append(_task(units, context))
            units, weight = [], 0
        units.append(unit)
        weight += unit.weight
    if units:
        tasks.append(_task(units, context))
    return tasks


def _task(units: list[Unit], context: Mapping[str, JSON]) -> Task:
    value = {"context": dict(context), "units": [unit.identity() for unit in units]}
    return Task(units=tuple(units), key=hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32])


def _units(file: SourceFile, text_column: str) -> Iterator[Unit]:
    if file.format is not Format.PARQUET:
        yield Unit(file=file, weight=file.size)
        return
    try:
        with pq.ParquetFile(file.path) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, "Parquet file", error) from error
    _check_text_column(file, schema, text_column)
    column = next(index for index in range(metadata.num_columns) if metadata.schema.column(index).path == text_column)
    first_row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        weight = rows.column(column).total_uncompressed_size
        yield Unit(file=file, weight=weight, row_groups=(group, group + 1), first_row=first_row)
        first_row += rows.num_rows


def _check_text_column(file: SourceFile, schema: pa.Schema, name: str) -> None:
    if name not in schema.names:
        raise InputError(
            f"{file.path}: has no column {name!r} (it has {', '.join(map(repr, schema.names)) or 'none'}); "
            "name the one that holds the text with --text-column"
        )
    if schema.names.count(name) > 1:
        raise InputError(f"{file.path}: has {schema.names.count(name)} columns {name!r}; rename all but one")
    kind = schema.field(name).type
    if not is_textual(kind):
        raise InputError(
            f"{file.path}: column {name!r} has type {kind}, text must be strings; name another with --text-column"
        )


def is_textual(kind: pa.DataType) -> bool:
    """Return whether values of an Arrow type are strings, or bytes that may be UTF-8."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
        or pa.types.is_binary(value)
        or pa.types.is_large_binary(value)
    )
