"""The plan of a job: the files of all sources cut into tasks, the same for every number of workers.

    sources = resolve_sources(recipe, leave_out=output)     # the one place where anything remote is listed
    plan = plan_tasks(sources, shard_bytes=…, context=…, policy=…)
    for task in plan.tasks: for unit in task.units: read_unit(unit, task.reading, …)

A task is a run of consecutive units of one source. Its key is a checksum of all that decides its output, so that a
resumed job takes over exactly the tasks that would come out equal.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Final

from blt_data.errors import InputError, SetupError
from blt_data.footers import parquet_units
from blt_data.readers.reasons import DAMAGED
from blt_data.reading import Reading, Unit
from blt_data.recipe import Recipe, check_names
from blt_data.shards.schema import JSON, canonical_json
from blt_data.skips import ErrorPolicy, Skips
from blt_data.sources import Format, Source, SourceFile, resolve_source

#: Bytes of text up to which row groups of a Parquet file are read in one go.
_UNIT_BYTES: Final = 16 << 20

#: A task should fill a few shards, and there should not be too many of them to keep account of.
_SHARDS_PER_TASK: Final = 4
_MOST_TASKS: Final = 4096

#: Remote Parquet files up to which their footers are read while planning, and how many at a time.
_MOST_FOOTERS: Final = 256
_FOOTER_THREADS: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSource:
    """One source of a job, with its files."""

    source: Source
    reading: Reading
    limit_bytes: int | None = None
    """The most content bytes it may give: its own limit, or its share of the recipe's."""

    def provenance(self) -> dict[str, JSON]:
        """Return what decides its documents."""
        return {
            **self.source.provenance(),
            "source": self.reading.source,
            "text_column": self.reading.text_column,
            "id_column": self.reading.id_column,
            "limit_bytes": self.limit_bytes,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Consecutive units of one source that one process reads."""

    source: int
    """Index of the source in the plan."""
    reading: Reading
    units: tuple[Unit, ...]
    key: str

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return sum(unit.weight for unit in self.units)

    @property
    def name(self) -> str:
        """What messages call the task: its source and its files."""
        first, last = self.units[0].file.relative, self.units[-1].file.relative
        return f"{self.reading.source}: {first}{'' if first == last else f' to {last}'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that is to be read, in source order."""

    sources: tuple[PlannedSource, ...]
    tasks: tuple[Task, ...]
    skipped: Skips
    """Files that nothing recognises and, where bad input is skipped, that turned out damaged while planning."""

    @property
    def weight(self) -> int:
        """Bytes to read."""
        return sum(task.weight for task in self.tasks)


def resolve_sources(recipe: Recipe, *, leave_out: Path | None = None) -> tuple[PlannedSource, ...]:
    """Find the files of all sources of a recipe.

    Args:
        recipe: the sources.
        leave_out: a directory whose files are never part of a source (the output).

    Raises:
        InputError: a source is nothing that can be read, or two have one name.
        OSError: a source cannot be listed.
    """
    planned = []
    for spec, limit in zip(recipe.sources, recipe.shares(), strict=True):
        source = resolve_source(spec.source, revision=spec.revision, leave_out=leave_out, kind=spec.format)
        reading = Reading(
            source=spec.name or source.name,
            text_column=spec.text_column,
            id_column=spec.id_column or source.id_column or "id",
        )
        planned.append(PlannedSource(source=source, reading=reading, limit_bytes=limit))
    check_names(Counter(item.reading.source for item in planned))
    return tuple(planned)


def plan_tasks(
    sources: Sequence[PlannedSource], *, shard_bytes: int, context: Mapping[str, JSON], policy: ErrorPolicy
) -> Plan:
    """Cut the files of all sources into tasks, which depends on nothing but them and the size of shards.

    Args:
        sources: the sources, in the order in which they are read.
        shard_bytes: content bytes of a shard; a task has a few times as much to read.
        context: everything else that decides the output of a task; part of each task's key.
        policy: says whether a damaged Parquet file ends the job or is left out.

    Raises:
        SetupError: a Parquet file has no such column, or may not be read.
        InputError: a Parquet file is damaged.
        OSError: a file cannot be read.
    """
    skipped = Skips()
    for item in sources:
        skipped.merge(item.source.skipped)
    policy = ErrorPolicy(policy.on_error, skipped)
    unit_bytes = min(_UNIT_BYTES, _SHARDS_PER_TASK * shard_bytes)
    units = [_units_of(item, unit_bytes, policy) for item in sources]
    total = sum(unit.weight for unit in chain.from_iterable(units))
    task_bytes = max(_SHARDS_PER_TASK * shard_bytes, total // _MOST_TASKS)
    tasks, ordinal = list[Task](), 0
    for index, (item, own) in enumerate(zip(sources, units, strict=True)):
        numbered = [replace(unit, ordinal=ordinal + offset) for offset, unit in enumerate(own)]
        ordinal += len(own)
        tasks += [_task(index, item.reading, group, context) for group in _groups(numbered, task_bytes)]
    return Plan(sources=tuple(sources), tasks=tuple(tasks), skipped=skipped)


def _groups(units: Sequence[Unit], task_bytes: int) -> Iterator[list[Unit]]:
    group, weight = list[Unit](), 0
    for unit in units:
        if group and weight + unit.weight > task_bytes:
            yield group
            group, weight = [], 0
        group.append(unit)
        weight += unit.weight
    if group:
        yield group


def _task(source: int, reading: Reading, units: list[Unit], context: Mapping[str, JSON]) -> Task:
    names: list[JSON] = [reading.source, reading.text_column, reading.id_column]
    value = {"context": dict(context), "reading": names, "units": [unit.identity() for unit in units]}
    key = hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]
    return Task(source=source, reading=reading, units=tuple(units), key=key)


def _units_of(item: PlannedSource, unit_bytes: int, policy: ErrorPolicy) -> list[Unit]:
    files = item.source.files
    remote = [file for file in files if file.is_remote and file.format is Format.PARQUET]
    if len(remote) > _MOST_FOOTERS:
        return list(
            chain.from_iterable(_units(file, item.reading, unit_bytes, policy, footers=False) for file in files)
        )
    if not remote:
        return list(chain.from_iterable(_units(file, item.reading, unit_bytes, policy) for file in files))
    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footers") as pool:
        futures = [pool.submit(_units, file, item.reading, unit_bytes, policy) for file in files]
        try:
            return list(chain.from_iterable(future.result() for future in futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _units(
    file: SourceFile, reading: Reading, unit_bytes: int, policy: ErrorPolicy, *, footers: bool = True
) -> list[Unit]:
    if file.format is not Format.PARQUET or (file.is_remote and not footers):
        return [Unit(file=file, weight=file.size)]
    try:
        return parquet_units(file, reading, unit_bytes)
    except SetupError:
        raise
    except InputError as error:
        policy.bad(error, DAMAGED, file.size)
        return []
