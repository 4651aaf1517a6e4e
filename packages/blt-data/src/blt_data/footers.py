"""Parquet files cut into units by what their footers say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pyarrow.parquet as pq

from blt_data.columns import check_id_column, check_text_column
from blt_data.readers.damage import DAMAGE, unreadable
from blt_data.readers.parquet import text_bytes
from blt_data.reading import Reading, Unit
from blt_data.sources import SourceFile, open_file


def parquet_units(file: SourceFile, reading: Reading, unit_bytes: int) -> list[Unit]:
    """Read a Parquet file's footer and return its units: runs of row groups.

    Args:
        file: the file.
        reading: names of the columns, which are checked.
        unit_bytes: bytes of text up to which row groups are read in one go.

    Raises:
        ColumnError: the file has no such column.
        InputError: the file is damaged.
        OSError: the file cannot be read.
    """
    try:
        with open_file(file) as raw, pq.ParquetFile(raw, pre_buffer=False) as parquet:
            check_text_column(file.location, parquet.schema_arrow, reading.text_column)
            check_id_column(file.location, parquet.schema_arrow, reading.id_column)
            return list(_merged(_row_groups(file, parquet.metadata, reading.text_column), unit_bytes))
    except DAMAGE as error:
        raise unreadable(file, "Parquet file", error) from error


def _row_groups(file: SourceFile, metadata: pq.FileMetaData, text_column: str) -> Iterator[Unit]:
    """Yield a unit for each row group."""
    first_row = 0
    for group, weight in enumerate(text_bytes(metadata, text_column)):
        yield Unit(file=file, weight=weight, row_groups=(group, group + 1), first_row=first_row)
        first_row += metadata.row_group(group).num_rows


def _merged(groups: Iterator[Unit], unit_bytes: int) -> Iterator[Unit]:
    unit: Unit | None = None
    for group in groups:
        if unit is not None and unit.row_groups and group.row_groups and unit.weight + group.weight <= unit_bytes:
            ends = (unit.row_groups[0], group.row_groups[1])
            unit = replace(unit, weight=unit.weight + group.weight, row_groups=ends)
            continue
        if unit is not None:
            yield unit
        unit = group
    if unit is not None:
        yield unit
