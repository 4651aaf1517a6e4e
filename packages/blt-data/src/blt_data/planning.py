"""From what the user wants to a job: sources are listed, cut into tasks, and every option is settled."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from blt_data.config import ForeignReader, PrepareConfig
from blt_data.gather import GatherOptions
from blt_data.identity import step_identity
from blt_data.jobs import Job, ScatterTask
from blt_data.limits import Limits
from blt_data.memory import MemoryPlan, plan_memory
from blt_data.ordering import Ordering
from blt_data.plan import PlannedSource, Task, plan_tasks, resolve_sources
from blt_data.recipe import Recipe, SourceSpec, read_recipe
from blt_data.scatter import ScatterOptions
from blt_data.shards import JSON
from blt_data.shards.schema import canonical_json
from blt_data.skips import ErrorPolicy, Skips
from blt_data.sources import Format
from blt_data.splits import splits_of_run

#: Memory that a scatter task collects before it writes a sub-run, at least, if there is as much. More memory than is of
#: use costs time: what is used again and again is there already.
_BUFFER: Final = 64 << 20

#: Sub-runs grow with the corpus, so that what a shard gets of each does not become too small to be read at a stretch:
#: for shards of 64 MiB, 128 KiB.
_LARGEST_SHARE: Final = 512

#: What decides the output beside the sources.
_OPTIONS: Final = (
    "holdout_fraction",
    "limit_bytes",
    "shard_bytes",
    "shuffle_seed",
    "deduplicate",
    "compression",
    "on_error",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedJob:
    """A job and its first tasks."""

    job: Job
    tasks: tuple[ScatterTask, ...]
    """Scatter tasks, in source order."""
    limits: Limits
    provenance: Mapping[str, JSON]
    files: int
    """Source files to read."""
    memory: MemoryPlan


def recipe_of(config: PrepareConfig) -> Recipe:
    """Return the recipe of a job; a plain source is a recipe of one.

    Args:
        config: what to prepare.

    Raises:
        InputError: the recipe's file is no recipe.
        OSError: it cannot be read.
    """
    if config.source is not None:
        spec = SourceSpec(
            source=config.source,
            name=config.source_name,
            revision=config.revision,
            text_column=config.text_column,
            id_column=config.id_column,
        )
        return Recipe(sources=(spec,), limit_bytes=config.limit_bytes)
    given = config.recipe
    recipe = given if isinstance(given, Recipe) else read_recipe(os.fspath(given or ""))
    return recipe if config.limit_bytes is None else replace(recipe, limit_bytes=config.limit_bytes)


def plan_job(
    config: PrepareConfig,
    *,
    steps: Sequence[object] = (),
    reader: ForeignReader | None = None,
    workers: int = 1,
    on_one_machine: bool = True,
) -> PlannedJob:
    """List the sources and settle everything that a job's tasks are told.

    Args:
        config: what the user wants.
        steps: datatrove blocks between reading and writing.
        reader: what gives the documents in place of our reader; the config's source then only names it.
        workers: tasks at once, at most.
        on_one_machine: whether they share this machine's memory.

    Raises:
        InputError: bad input.
        OSError: a source cannot be listed.
    """
    output = Path(config.output).absolute()
    sources: tuple[PlannedSource, ...] = ()
    limits = Limits(total_bytes=config.limit_bytes, of_source={})
    if reader is None:
        config, sources, limits = _resolve(config, output)
    provenance = _provenance(config, sources, steps, reader)
    policy = ErrorPolicy(config.on_error)
    plan = plan_tasks(sources, shard_bytes=config.shard_bytes, context={}, policy=policy)
    tasks = _scatter_tasks(plan.tasks) if reader is None else _foreign_tasks(reader)
    expected_bytes = _expected(tasks, limits, reader)
    ordering = Ordering.of(
        seed=config.shuffle_seed,
        deduplicate=config.deduplicate,
        shard_bytes=config.shard_bytes,
        expected_bytes=expected_bytes,
    )
    memory = plan_memory(
        limit_bytes=config.memory_limit,
        workers=workers,
        on_one_machine=on_one_machine,
        shard_bytes=config.shard_bytes,
        unit_bytes=_largest_part(tasks),
    )
    scatter = ScatterOptions(
        ordering=ordering,
        splits=splits_of_run(config.holdout_fraction),
        holdout_fraction=config.holdout_fraction,
        durable=not on_one_machine,
        buffer_bytes=min(memory.buffer_bytes, max(_BUFFER, expected_bytes // _LARGEST_SHARE)),
    )
    job = _job(config, output, scatter, provenance, sources, plan.skipped)
    return PlannedJob(
        job=job,
        tasks=tuple(_keyed(tasks, config, ordering, provenance)),
        limits=limits,
        provenance=provenance,
        files=sum(len(item.source.files) for item in sources),
        memory=memory,
    )


def _resolve(config: PrepareConfig, output: Path) -> tuple[PrepareConfig, tuple[PlannedSource, ...], Limits]:
    """Return the config with what its recipe says, the sources listed, and their limits."""
    recipe = recipe_of(config)
    sources = resolve_sources(recipe, leave_out=output)
    if config.shuffle_seed == 0 and recipe.seed is not None:
        config = replace(config, shuffle_seed=recipe.seed)
    return replace(config, limit_bytes=recipe.limit_bytes), sources, _limits(recipe, sources)


def _scatter_tasks(tasks: Sequence[Task]) -> list[ScatterTask]:
    return [
        ScatterTask(
            index=index, name=task.name, key=task.key, source=task.source, units=task.units, reading=task.reading
        )
        for index, task in enumerate(tasks)
    ]


def _foreign_tasks(reader: ForeignReader) -> list[ScatterTask]:
    return [ScatterTask(index=rank, name=f"rank {rank}", key=f"{rank}/{reader.tasks}") for rank in range(reader.tasks)]


def _job(
    config: PrepareConfig,
    output: Path,
    scatter: ScatterOptions,
    provenance: Mapping[str, JSON],
    sources: Sequence[PlannedSource],
    skipped: Skips,
) -> Job:
    recipe = config.recipe
    return Job(
        output=output,
        scatter=scatter,
        gather=GatherOptions(
            ordering=scatter.ordering,
            provenance={split: {**provenance, "split": split} for split in scatter.splits},
            sources=tuple(item.reading.source for item in sources) or None,
            shard_bytes=config.shard_bytes,
            compression=config.compression,
        ),
        on_error=config.on_error,
        source=config.source or (os.fspath(recipe) if isinstance(recipe, str | os.PathLike) else "recipe"),
        skipped=skipped,
        key=_checksum({"provenance": provenance}),
    )


def _limits(recipe: Recipe, sources: Sequence[PlannedSource]) -> Limits:
    of_source = {index: item.limit_bytes for index, item in enumerate(sources) if item.limit_bytes is not None}
    return Limits(total_bytes=recipe.undivided_bytes, of_source=of_source)


def _expected(tasks: Sequence[ScatterTask], limits: Limits, reader: ForeignReader | None) -> int:
    """Return the content bytes of all documents, as near as can be told before reading."""
    expected: dict[int, int] = {}
    for task in tasks:
        expected[task.source] = expected.get(task.source, 0) + task.expected_bytes
    total = sum(min(size, limits.of_source.get(source, size)) for source, size in expected.items())
    if reader is not None:
        total = reader.expected_bytes
    return total if limits.total_bytes is None else min(total, limits.total_bytes)


def _largest_part(tasks: Sequence[ScatterTask]) -> int:
    """Return the bytes of text that a reader must hold at once: a row group, or a text file."""
    most = 0
    for unit in (unit for task in tasks for unit in task.units):
        if unit.row_groups is not None:
            most = max(most, unit.weight)
        elif unit.file.format in (Format.TEXT, Format.PYTHON):
            # The file and its text are there at once.
            most = max(most, 2 * unit.weight)
    return most


def _keyed(
    tasks: Sequence[ScatterTask], config: PrepareConfig, ordering: Ordering, provenance: Mapping[str, JSON]
) -> list[ScatterTask]:
    """Return tasks whose keys cover all that decides what they spill."""
    context = {
        "ordering": asdict(ordering),
        "holdout_fraction": config.holdout_fraction,
        "on_error": str(config.on_error),
        **{name: provenance.get(name) for name in ("steps", "reader", "packages")},
    }
    return [
        replace(task, key=_checksum({**context, "task": task.key, "places": [unit.ordinal for unit in task.units]}))
        for task in tasks
    ]


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def _provenance(
    config: PrepareConfig,
    sources: Sequence[PlannedSource],
    steps: Sequence[object],
    reader: ForeignReader | None,
) -> dict[str, JSON]:
    """Return where the documents come from: without paths, times or numbers of workers, which do not decide them."""
    provenance: dict[str, JSON] = {
        "command": "blt-data prepare",
        "options": {name: getattr(config, name) for name in _OPTIONS},
        "packages": {name: version(name) for name in ("blt-data", "pyarrow")},
    }
    if reader is not None:
        provenance["reader"] = [step_identity(block) for block in reader.blocks]
    elif len(sources) == 1 and config.recipe is None:
        provenance["source"] = sources[0].provenance()
    else:
        provenance["sources"] = [item.provenance() for item in sources]
    if steps or reader is not None:
        packages = provenance["packages"]
        if isinstance(packages, dict):
            packages["datatrove"] = version("datatrove")
    if steps:
        provenance["steps"] = [step_identity(step) for step in steps]
    return provenance
