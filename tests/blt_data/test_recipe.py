"""Recipes and plans: several sources, each with its name, columns, limit and share."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import blt_data.plan
from blt_data import InputError, ShardDirectory
from blt_data.cli import main
from blt_data.ingest import PrepareConfig, prepare
from blt_data.plan import Plan, plan_tasks, resolve_sources
from blt_data.recipe import Recipe, SourceSpec, read_recipe
from blt_data.skips import ErrorPolicy
from blt_data.sources import Format

from .corpora import json_lines, read_documents, write_parquet
from .reading import plan_of, read_plan

WHOLE = """
seed: 7
limit_bytes: 10MB
sources:
  - source: fineweb-edu/sample-10BT
    name: web
    revision: "1234567"
    weight: 3
    limit_bytes: 2 GiB
  - source: s3://bucket/*.data
    text_column: body
    id_column: metadata.key
    format: json-lines
    weight: 1
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_key(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, WHOLE))
    web = SourceSpec(source="fineweb-edu/sample-10BT", name="web", revision="1234567", weight=3, limit_bytes=2 << 30)
    other = SourceSpec(
        source="s3://bucket/*.data", text_column="body", id_column="metadata.key", format=Format.JSON_LINES, weight=1
    )
    assert recipe == Recipe(seed=7, limit_bytes=10_000_000, sources=(web, other))
    assert recipe.shares() == (7_500_000, 2_500_000)


def test_short_forms(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "sources: [a, {source: b, limit_bytes: 5}]"))
    assert recipe == Recipe(sources=(SourceSpec(source="a"), SourceSpec(source="b", limit_bytes=5)))
    assert recipe.shares() == (None, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", r"recipe.yaml, line 1: is no YAML \("),
        ("\0", "is no YAML"),
        ("", "the recipe must be a mapping of sources, seed, limit_bytes"),
        ("[a]", "the recipe must be a mapping"),
        ("seed: 1", "has no list of sources; write a list `sources:`"),
        ("sources: []", "has no list of sources"),
        ("source: a", "unknown key 'source'; did you mean 'sources'?"),
        ("sources: [a]\nlimitbytes: 1", "unknown key 'limitbytes'; did you mean 'limit_bytes'?"),
        ("sources: [{source: a, wieght: 1}]", "source 1 has an unknown key 'wieght'; did you mean 'weight'?"),
        ("sources: [a, {source: b, 7: 1}]", "source 2 has an unknown key 7; known are source, name"),
        ("sources: [{name: a}]", "source 1 does not say which"),
        ("sources: [5]", "source 1 must be a mapping"),
        ("sources: [{source: a, revision: 1234567}]", "revision must be a text, not 1234567; put it in quotes"),
        ("sources: [{source: a, name: ''}]", "name must be a text"),
        ("sources: [{source: a, weight: 1}]", "has weights but no limit_bytes, of which they would be shares"),
        ("limit_bytes: 5\nsources: [{source: a, weight: 1}, b]", "gives b no weight but others one"),
        ("limit_bytes: 5\nsources: [{source: a, weight: 0}]", "weight must be a number above 0, not 0"),
        ("limit_bytes: 5\nsources: [{source: a, weight: .inf}]", "weight must be a number above 0"),
        ("limit_bytes: 5\nsources: [{source: a, weight: .nan}]", "weight must be a number above 0"),
        ("limit_bytes: 5\nsources: [{source: a, weight: true}]", "weight must be a number above 0, not True"),
        ("sources: [a]\nlimit_bytes: lots", "limit_bytes: 'lots' is no number of bytes"),
        ("sources: [a]\nlimit_bytes: -1", "no number of bytes"),
        ("sources: [a]\nlimit_bytes: [1]", "must be a number of bytes such as 10GB"),
        ("sources: [{source: a, format: csv}]", "format must be one of parquet, arrow, json-lines, text, python"),
        ("sources: [a]\nseed: -1", "seed must be a whole number from 0"),
        ("sources: [a]\nseed: 1.5", "seed must be a whole number"),
        ("sources: [{source: a, name: n}, {source: b, name: n}]", "2 sources of the recipe are called 'n'"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")) as caught:
        read_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["sources", "source", "weight", "limit_bytes", "name", "seed", "x"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(value=yaml_values | st.binary(max_size=40))
def test_anything_else_is_a_recipe_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("any") / "recipe.yaml"
    path.write_bytes(value if isinstance(value, bytes) else yaml.safe_dump(value).encode())
    try:
        recipe = read_recipe(path)
    except InputError as error:
        message = str(error)
        assert message.startswith(str(path)), message
    else:
        assert recipe.sources


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6),
    limit=st.integers(10_000, 10**15),
)
def test_shares_are_in_proportion(weights: list[float], limit: int) -> None:
    sources = tuple(SourceSpec(source=str(index), weight=weight) for index, weight in enumerate(weights))
    shares = [share or 0 for share in Recipe(sources=sources, limit_bytes=limit).shares()]
    assert sum(shares) <= limit + len(shares)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - limit * weight / sum(weights)) <= 1 + 1e-9 * limit


@pytest.fixture
def sources(tmp_path: Path) -> Recipe:
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(5):
            write_parquet(tmp_path / name / f"{index}.parquet", [f"{name} {index} {row} " * 9 for row in range(20)])
    (tmp_path / "c.jsonl").write_bytes(json_lines(["c"]).replace(b'"text"', b'"body"'))
    specs = (
        SourceSpec(source=str(tmp_path / "a"), limit_bytes=77),
        SourceSpec(source=str(tmp_path / "b"), name="second"),
        SourceSpec(source=str(tmp_path / "c.jsonl"), text_column="body"),
    )
    return Recipe(sources=specs)


def planned(recipe: Recipe, shard_bytes: int) -> Plan:
    return plan_tasks(resolve_sources(recipe), shard_bytes=shard_bytes, context={"seed": 1}, policy=ErrorPolicy())


def test_documents_keep_their_source(sources: Recipe) -> None:
    found = read_plan(planned(sources, 100))
    assert Counter(row[0] for row in found) == {"a": 100, "second": 100, "c.jsonl": 1}
    # In the order of the recipe, then of the files; documents of different sources may have the same path and row.
    assert [row[4][:1] for row in found] == [b"a"] * 100 + [b"b"] * 100 + [b"c"]


@pytest.mark.parametrize("shard_bytes", [1, 200, 900, 1 << 40])
def test_tasks_are_of_one_source_and_a_few_shards(sources: Recipe, shard_bytes: int) -> None:
    plan = planned(sources, shard_bytes)
    assert [item.limit_bytes for item in plan.sources] == [77, None, None]
    assert read_plan(plan) == read_plan(planned(sources, 300))
    for task in plan.tasks:
        assert task.reading == plan.sources[task.source].reading
        assert task.weight <= max(4 * shard_bytes, plan.weight // 4096) or len(task.units) == 1
        assert {unit.file for unit in task.units} <= set(plan.sources[task.source].source.files)
    for before, after in zip(plan.tasks, plan.tasks[1:], strict=False):
        full = before.weight + after.units[0].weight > 4 * shard_bytes
        assert full or before.source != after.source
    assert len({task.key for task in plan.tasks}) == len(plan.tasks)


def test_there_are_not_too_many_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blt_data.plan, "_MOST_TASKS", 40)
    for index in range(500):
        (tmp_path / f"{index:05d}.txt").write_bytes(b"x" * (index % 100))
    plan = plan_of(tmp_path, shard_bytes=1)
    # None is more than full, and no two neighbours would fit into one.
    assert 40 <= len(plan.tasks) <= 80
    assert sum(len(task.units) for task in plan.tasks) == 500


def test_keys_tell_what_a_task_reads(sources: Recipe, tmp_path: Path) -> None:
    first = planned(sources, 300)
    assert planned(sources, 300) == first
    other = plan_tasks(resolve_sources(sources), shard_bytes=300, context={"seed": 2}, policy=ErrorPolicy())
    assert not {task.key for task in other.tasks} & {task.key for task in first.tasks}
    write_parquet(tmp_path / "b" / "3.parquet", ["new"] * 20)
    changed = planned(sources, 300)
    same = {task.key for task in changed.tasks} & {task.key for task in first.tasks}
    touched = [task for task in first.tasks if any(unit.file.location.endswith("b/3.parquet") for unit in task.units)]
    assert touched
    assert not {task.key for task in touched} & same
    assert len(same) >= len(first.tasks) // 2


def test_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder / "text").mkdir(parents=True)
        (tmp_path / folder / "text" / "a.txt").write_bytes(b"a")
    specs = [SourceSpec(source=str(tmp_path / folder / "text")) for folder in ("x", "y")]
    with pytest.raises(InputError, match="2 sources of the recipe are called 'text'; give each a `name` of its own"):
        resolve_sources(Recipe(sources=tuple(specs)))


def test_provenance_says_nothing_of_this_machine(sources: Recipe, tmp_path: Path) -> None:
    values = [item.provenance() for item in resolve_sources(sources)]
    assert str(tmp_path) not in str(values)
    assert [value["source"] for value in values] == ["a", "second", "c.jsonl"]
    assert [value["files"] for value in values] == [5, 5, 1]
    assert all(len(str(value["listing_sha256"])) == len(hashlib.sha256().hexdigest()) for value in values)


def test_prepared_by_shares(tmp_path: Path) -> None:
    """Sources give their shares in the order of the recipe, and one that is smaller is told, not repeated."""
    for name, count in (("a", 100), ("b", 100), ("small", 2)):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([f"{name}{row:09d}"[-10:] for row in range(count)]))
    text = f"""
        limit_bytes: 1000
        sources:
          - {{source: {tmp_path}/a.jsonl, weight: 1, name: a}}
          - {{source: {tmp_path}/small.jsonl, weight: 1, name: small}}
          - {{source: {tmp_path}/b.jsonl, weight: 2, name: b}}
    """
    command = ["prepare", "--recipe", str(written(tmp_path, text)), "--output", str(tmp_path / "out"), "--workers", "1"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    shards = ShardDirectory.open(tmp_path / "out", verify=True)
    found = Counter(shards.shard(shard).source(row) for shard, row in shards.documents())
    assert found == {"a": 25, "small": 2, "b": 50}
    sentence = "small holds 20 B, less than its limit or share of 250 B; nothing is repeated to make up for it"
    assert result.stderr.splitlines().count(sentence) == 1


def test_a_large_document_beyond_a_share_ends_only_its_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a" * 400, "A" * 900]))
    (tmp_path / "b.jsonl").write_bytes(json_lines(["b" * 400, "B" * 900]))
    specs = tuple(SourceSpec(source=str(tmp_path / f"{name}.jsonl"), weight=1) for name in "ab")
    recipe = Recipe(sources=specs, limit_bytes=1000)
    prepare(PrepareConfig(recipe=recipe, output=tmp_path / "out", workers=1, shuffle_seed=None))
    assert [content[:1] for _, content in read_documents(tmp_path / "out")] == [b"a", b"b"]
