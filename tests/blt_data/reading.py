"""Reading a source from end to end without preparing it, for tests."""

from __future__ import annotations

from pathlib import Path

from blt_data.documents import BATCH_BYTES
from blt_data.plan import Plan, plan_tasks, resolve_sources
from blt_data.readers import OpenParquet, read_unit
from blt_data.recipe import Recipe, SourceSpec
from blt_data.skips import ErrorPolicy, OnError

#: (source, file, row, id, content)
Found = tuple[str, str, int, str, bytes]


def plan_of(source: str | Path | Recipe, *, shard_bytes: int = 1 << 26, skip: bool = False, **spec: object) -> Plan:
    recipe = source
    if not isinstance(recipe, Recipe):
        recipe = Recipe(sources=(SourceSpec(source=str(source), **spec),))  # type: ignore[arg-type]
    policy = ErrorPolicy(OnError.SKIP if skip else OnError.FAIL)
    return plan_tasks(resolve_sources(recipe), shard_bytes=shard_bytes, context={}, policy=policy)


def read_plan(plan: Plan, policy: ErrorPolicy | None = None) -> list[Found]:
    """Return all documents, after checking what every batch promises."""
    policy = policy or ErrorPolicy()
    found: list[Found] = []
    ordinals = []
    with OpenParquet() as opened:
        for task in plan.tasks:
            for unit in task.units:
                ordinals.append(unit.ordinal)
                told: list[int] = []
                for batch in read_unit(unit, task.reading, policy=policy, advance=told.append, opened=opened):
                    assert len(batch) == 1 or (len(batch) > 1 and batch.content_bytes <= BATCH_BYTES)
                    assert batch.document_ids.null_count == batch.contents.null_count == 0
                    contents = batch.contents.to_pylist()
                    offsets = batch.offsets
                    assert contents == [batch.data[offsets[i] : offsets[i + 1]].tobytes() for i in range(len(contents))]
                    names = batch.document_ids.to_pylist()
                    rows = batch.rows.tolist()
                    found += [(batch.source, batch.file, *rest) for rest in zip(rows, names, contents, strict=True)]
                assert sum(told) == unit.weight
    assert ordinals == list(range(len(ordinals)))
    return found


def read_source(source: str | Path | Recipe, **options: object) -> list[Found]:
    return read_plan(plan_of(source, **options))  # type: ignore[arg-type]
