"""The plan of a run: source files cut into tasks, the same for every number of workers.

A task is a run of consecutive units of one source. Its key is a checksum of all that decides its output, so that a
resumed run takes over exactly the tasks that would come out equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from blt_data.footers import parquet_units
from blt_data.reading import Reading, Unit
from blt_data.shards.schema import JSON, canonical_json
from blt_data.sources import Format, Source, SourceFile

#: Bytes of text up to which row groups of a Parquet file are read in one go.
_UNIT_BYTES: Final = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Units of one source that one process reads."""

    reading: Reading
    units: tuple[Unit, ...]
    key: str

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return sum(unit.weight for unit in self.units)


def plan_tasks(source: Source, reading: Reading, *, task_bytes: int | None, context: Mapping[str, JSON]) -> list[Task]:
    """Cut a source into tasks.

    Args:
        source: the files.
        reading: names of the source and its columns, which Parquet files must have.
        task_bytes: weight at which a task is full; None makes one task of everything, as a limit on the total of
            bytes needs.
        context: everything else that decides the output; part of each task's key.

    Raises:
        InputError: a Parquet file is damaged or has no such column.
    """
    unit_bytes = _UNIT_BYTES if task_bytes is None else min(_UNIT_BYTES, task_bytes)
    tasks, units, weight = [], list[Unit](), 0
    every = (unit for file in source.files for unit in _units(file, reading, unit_bytes))
    for ordinal, unit in enumerate(every):
        if units and task_bytes is not None and weight + unit.weight > task_bytes:
            tasks.append(_task(reading, units, context))
            units, weight = [], 0
        units.append(replace(unit, ordinal=ordinal))
        weight += unit.weight
    if units:
        tasks.append(_task(reading, units, context))
    return tasks


def _task(reading: Reading, units: list[Unit], context: Mapping[str, JSON]) -> Task:
    value = {"context": dict(context), "units": [unit.identity() for unit in units]}
    key = hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]
    return Task(reading=reading, units=tuple(units), key=key)


def _units(file: SourceFile, reading: Reading, unit_bytes: int) -> Iterator[Unit]:
    if file.format is Format.PARQUET:
        yield from parquet_units(file, reading, unit_bytes)
    else:
        yield Unit(file=file, weight=file.size)
