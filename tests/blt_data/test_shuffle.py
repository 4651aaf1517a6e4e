"""The shuffle: the same shards whatever the tasks, workers and memory; a real permutation; no duplicate, no loss."""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blt_data import InputError, ShardDirectory
from blt_data.documents import DocumentBatch
from blt_data.gather import GatherOptions, gather
from blt_data.groups import Spilled, plan_groups
from blt_data.ingest import PrepareConfig, PrepareResult, TasksFailedError, prepare
from blt_data.jobs import ScatterTask
from blt_data.limits import Limits, Waves
from blt_data.memory import plan_memory
from blt_data.ordering import Ordering, content_keys
from blt_data.plan import Plan, plan_tasks
from blt_data.recipe import Recipe, SourceSpec
from blt_data.records import Beyond, ScatterRecord, read_scatter_record, write_scatter_record
from blt_data.scatter import Scatter, ScatterOptions
from blt_data.scratch import Scratch
from blt_data.shards import Shard
from blt_data.skips import OnError, Skips
from blt_data.splits import split_of

from .corpora import files_of, json_lines, read_documents, write_parquet


def run(source: Path | str | Recipe, output: Path, **options: object) -> PrepareResult:
    where = {"recipe": source} if isinstance(source, Recipe) else {"source": str(source)}
    return prepare(PrepareConfig(output=output, **where, **options))  # type: ignore[arg-type]


# --- the core against a plain sort in memory ---------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """A document, as a test thinks of it."""

    file: str
    row: int
    name: str
    content: bytes


def plain_order(documents: Sequence[Plain], seed: int | None, deduplicate: bool) -> list[Plain]:
    """Say in the plainest way what must come out: hash everything, sort, drop what was there before."""
    if seed is None:
        return list(documents)

    def key(document: Plain) -> bytes:
        if deduplicate:
            digest = hashlib.blake2b(
                document.content, digest_size=16, key=str(seed).encode(), person=b"blt.content.1"
            ).digest()
            return digest[:8][::-1] + digest[8:][::-1]
        text = f"{seed}\0s\0{document.file}\0{document.row}\0{document.name}"
        return hashlib.blake2b(text.encode(), digest_size=8, person=b"blt.shuffle.1").digest()[::-1]

    ordered = sorted(documents, key=key)
    if deduplicate:
        seen: set[bytes] = set()
        ordered = [d for d in ordered if not (d.content in seen or seen.add(d.content))]  # type: ignore[func-returns-value]
    return ordered


def batch_of(documents: Sequence[Plain]) -> DocumentBatch:
    return DocumentBatch(
        source="s",
        file=documents[0].file,
        rows=np.array([document.row for document in documents]),
        document_ids=pa.array([document.name for document in documents], pa.string()),
        contents=pa.array([document.content for document in documents], pa.large_binary()),
    )


def scatter_and_gather(
    folder: Path,
    files: Sequence[Sequence[Plain]],
    ordering: Ordering,
    *,
    cuts: Sequence[int],
    buffer_bytes: int,
    shard_bytes: int,
    holdout: float | None,
) -> tuple[dict[str, list[tuple[str, bytes]]], Skips, list[int]]:
    """Return what lies in the staged shards of each split, what was dropped, and the shards' sizes."""
    splits = ("all",) if holdout is None else ("train", "holdout")
    options = ScatterOptions(
        ordering=ordering, splits=splits, holdout_fraction=holdout, durable=False, buffer_bytes=buffer_bytes
    )
    spilled, skipped = [], Skips()
    for task, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(files)], strict=True)):
        place = folder / "scatter" / str(task)
        place.mkdir(parents=True)
        with Scatter(place, options, scratch=Scratch()) as scatter:
            for unit in range(start, stop):
                if files[unit]:
                    scatter.add(batch_of(files[unit]), unit)
            record = scatter.finish(skipped=Skips())
        write_scatter_record(place, record)
        found = read_scatter_record(place)
        assert found is not None
        spilled.append(Spilled(folder=place, key=str(task), record=found))
        skipped.merge(record.skipped)
    plan = plan_groups(spilled, folder, splits=len(splits), shard_bytes=shard_bytes)
    gathering = GatherOptions(
        ordering=ordering,
        provenance={split: {} for split in splits},
        sources=None,
        shard_bytes=shard_bytes,
        compression="none",
    )
    contents: dict[str, list[tuple[str, bytes]]] = {split: [] for split in splits}
    sizes = []
    for group in range(len(plan)):
        place = folder / "gather" / str(group)
        gathered = gather(plan, group, place, gathering, lambda documents, size: None, Scratch())
        skipped.merge(gathered.skipped)
        for split, entries in gathered.splits.items():
            for entry in entries:
                shard = Shard.open(place / entry.name, verify=True)
                rows = range(shard.num_documents)
                contents[split] += [(shard.document_id(row), shard.content(row).tobytes()) for row in rows]
                sizes.append(entry.bytes if entry.documents > 1 else 0)
    return contents, skipped, sizes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    files=st.lists(st.lists(st.binary(max_size=12), max_size=8), min_size=1, max_size=6),
    seed=st.none() | st.integers(0, 5),
    deduplicate=st.booleans(),
    holdout=st.none() | st.just(0.4),
    shard_bytes=st.integers(1, 60),
    expected_bytes=st.integers(0, 10_000),
    buffer_bytes=st.integers(1, 3000),
    data=st.data(),
)
def test_scatter_and_gather_is_a_sort(
    files: list[list[bytes]],
    seed: int | None,
    deduplicate: bool,
    holdout: float | None,
    shard_bytes: int,
    expected_bytes: int,
    buffer_bytes: int,
    data: st.DataObject,
) -> None:
    deduplicate = deduplicate and seed is not None
    documents = [
        [Plain(f"f{index}", row, f"{index}-{row}-{row % 3}", content) for row, content in enumerate(file, start=1)]
        for index, file in enumerate(files)
    ]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(files)), max_size=3)))
    ordering = Ordering.of(seed=seed, deduplicate=deduplicate, shard_bytes=shard_bytes, expected_bytes=expected_bytes)
    with tempfile.TemporaryDirectory() as name:
        found, skipped, sizes = scatter_and_gather(
            Path(name),
            documents,
            ordering,
            cuts=cuts,
            buffer_bytes=buffer_bytes,
            shard_bytes=shard_bytes,
            holdout=holdout,
        )
    every = [document for file in documents for document in file]
    expected = plain_order(every, seed, deduplicate)
    for split, contents in found.items():
        assert contents == [(d.name, d.content) for d in expected if split_of(d.name, holdout) == split]
    assert all(size <= shard_bytes for size in sizes)
    dropped = [len(document.content) for document in every]
    kept = [len(document.content) for document in expected]
    assert (skipped["duplicate"].count if skipped else 0) == len(dropped) - len(kept)
    assert (skipped["duplicate"].bytes if skipped else 0) == sum(dropped) - sum(kept)


def test_contents_whose_keys_collide_are_both_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """64 bits collide among ten billion documents; here they always do."""
    real = content_keys

    def colliding(batch: DocumentBatch, seed: int) -> tuple[object, object]:
        keys, checks = real(batch, seed)
        return np.zeros_like(keys), checks

    monkeypatch.setattr("blt_data.scatter.content_keys", colliding)
    contents = [b"a", b"b", b"a", b"c", b"b", b"a"]
    documents = [[Plain("f", row, str(row), content) for row, content in enumerate(contents)]]
    found, skipped, _ = scatter_and_gather(
        tmp_path,
        documents,
        Ordering.of(seed=0, deduplicate=True, shard_bytes=100, expected_bytes=100),
        cuts=[],
        buffer_bytes=1,
        shard_bytes=100,
        holdout=None,
    )
    assert sorted(found["all"]) == [("0", b"a"), ("1", b"b"), ("3", b"c")]
    assert skipped["duplicate"].count == 3


# --- whole runs --------------------------------------------------------------------------------------------------


def corpus(folder: Path, files: int = 12, rows: int = 150) -> Path:
    """Write JSON lines and Parquet, a tenth of whose documents are copies of others."""
    generator = np.random.default_rng()
    folder.mkdir()
    texts: list[list[str]] = []
    for index in range(files):
        own = [f"{index}/{row} " + "ß" * int(generator.integers(0, 200)) for row in range(rows)]
        for row in generator.integers(0, rows, rows // 10).tolist():
            own[row] = texts[index // 2][row] if index else own[0]
        texts.append(own)
        if index % 2:
            (folder / f"{index:02d}.jsonl").write_bytes(json_lines(own))
        else:
            write_parquet(folder / f"{index:02d}.parquet", own, group=40)
    return folder


def test_same_shards_for_any_workers_and_memory(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    options = {"shard_bytes": 20_000, "holdout_fraction": 0.2, "deduplicate": True}
    run(source, tmp_path / "1", workers=1, **options)
    expected = files_of(tmp_path / "1")
    assert len(expected) > 10
    # The smaller memory makes several sub-runs of a task, and fewer workers than asked for.
    for name, workers, memory in (("2", 2, None), ("5", 5, None), ("small", 1, 200_000_000)):
        run(source, tmp_path / name, workers=workers, memory_limit=memory, **options)
        assert files_of(tmp_path / name) == expected


@pytest.mark.parametrize("seed", [0, None])
def test_same_shards_however_units_are_cut_into_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    source = corpus(tmp_path / "in", files=6)
    run(source, tmp_path / "usual", shard_bytes=10_000, shuffle_seed=seed)
    real = plan_tasks

    def one_task_of_all(*args: Any, **options: Any) -> Plan:
        plan = real(*args, **options)
        assert len(plan.tasks) == 6
        units = tuple(unit for task in plan.tasks for unit in task.units)
        return replace(plan, tasks=(replace(plan.tasks[0], units=units, key="all"),))

    monkeypatch.setattr("blt_data.planning.plan_tasks", one_task_of_all)
    run(source, tmp_path / "coarse", shard_bytes=10_000, shuffle_seed=seed)
    assert files_of(tmp_path / "coarse") == files_of(tmp_path / "usual")


def test_sub_runs_are_made_when_the_buffer_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the memory limit decides, with a buffer so small that it matters here."""
    source = corpus(tmp_path / "in", files=5)
    run(source, tmp_path / "usual", shard_bytes=60_000, deduplicate=True)
    plan = plan_memory
    monkeypatch.setattr("blt_data.planning.plan_memory", lambda **options: replace(plan(**options), buffer_bytes=8000))
    real, sub_runs = write_scatter_record, list[int]()

    def watch(folder: Path, record: ScatterRecord) -> None:
        sub_runs.append(len(record.sub_runs))
        real(folder, record)

    monkeypatch.setattr("blt_data.pipeline.write_scatter_record", watch)
    run(source, tmp_path / "small", shard_bytes=60_000, deduplicate=True, workers=1)
    assert max(sub_runs) > 1
    assert files_of(tmp_path / "small") == files_of(tmp_path / "usual")


def test_the_order_is_random(tmp_path: Path) -> None:
    """Rank correlation with source order, every file in every shard, and no two seeds alike."""
    folder = tmp_path / "in"
    folder.mkdir()
    files, rows = 8, 1500
    for index in range(files):
        write_parquet(folder / f"{index}.parquet", [f"{index} {row:07d}" for row in range(rows)], group=300)
    orders = []
    for seed in (random.randrange(2**64), random.randrange(2**64)):
        run(folder, tmp_path / str(seed), shuffle_seed=seed, shard_bytes=12_000)
        directory = ShardDirectory.open(tmp_path / str(seed))
        assert len(directory) > 8
        for index in range(len(directory)):
            shard = directory.shard(index)
            there = Counter(shard.document_id(row).split(".")[0] for row in range(shard.num_documents))
            # About 150 of each file: fewer than 80 or more than 230 would be six standard deviations.
            expected = shard.num_documents / files
            assert len(there) == files
            assert all(abs(count - expected) < 6 * expected**0.5 for count in there.values())
        names = [content.decode() for _, content in read_documents(tmp_path / str(seed))]
        orders.append(np.array([int(name[0]) * rows + int(name[2:]) for name in names]))
        assert sorted(orders[-1].tolist()) == list(range(files * rows))
    straight = np.arange(files * rows)
    # A correlation of independent orders has a standard deviation of 1 / sqrt(n) = 0.009.
    for one, other in ((orders[0], straight), (orders[1], straight), (orders[0], orders[1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.055
    # Neighbours are no neighbours of the source more often than by chance (two places of n).
    assert np.count_nonzero(np.abs(np.diff(orders[0])) == 1) < 15


def test_duplicates_are_dropped_across_files_and_splits(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    generator = np.random.default_rng()
    every: list[tuple[str, str]] = []
    for index in range(5):
        texts = [str(number) * 3 for number in generator.integers(0, 150, 100).tolist()]
        write_parquet(folder / f"{index}.parquet", texts, group=30)
        every += [(f"{index}.parquet#{row}", text) for row, text in enumerate(texts, start=1)]
    result = run(folder, tmp_path / "out", deduplicate=True, holdout_fraction=0.3, shard_bytes=50)
    first: dict[str, str] = {}
    for name, text in every:
        first.setdefault(text, name)
    found = [item for split in ("train", "holdout") for item in read_documents(tmp_path / "out" / split)]
    assert sorted(found) == sorted((name, text.encode()) for text, name in first.items())
    dropped = result.manifests[tmp_path / "out" / "train"].skipped["duplicate"]
    assert (dropped.count, dropped.bytes) == (
        len(every) - len(first),
        sum(len(text) for _, text in every) - sum(len(text) for text in first),
    )


def test_duplicates_need_a_shuffle(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(InputError, match=r"drop --no-shuffle or --deduplicate"):
        run(tmp_path / "a.parquet", tmp_path / "out", shuffle_seed=None, deduplicate=True)


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(InputError, match=r"memory limit of 100\.0 MB is too little.*one worker needs"):
        run(tmp_path / "a.parquet", tmp_path / "out", memory_limit=100_000_000)
    assert not (tmp_path / "out").exists()


def test_compressed_shards_hold_the_same(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in", files=4)
    for compression in ("none", "zstd"):
        run(source, tmp_path / compression, compression=compression, shard_bytes=20_000)
    assert read_documents(tmp_path / "zstd") == read_documents(tmp_path / "none")
    sizes = [sum(len(data) for data in files_of(tmp_path / name).values()) for name in ("zstd", "none")]
    assert sizes[0] < sizes[1] / 2


# --- several sources and limits ----------------------------------------------------------------------------------


def test_documents_of_a_recipe_keep_their_source(tmp_path: Path) -> None:
    (tmp_path / "code.jsonl").write_bytes(json_lines([f"code {index} " * 9 for index in range(300)]))
    write_parquet(tmp_path / "web.parquet", [f"web {index} " * 11 for index in range(400)], group=50)
    recipe = Recipe(
        sources=(
            SourceSpec(source=str(tmp_path / "web.parquet"), name="web", limit_bytes=20_000),
            SourceSpec(source=str(tmp_path / "code.jsonl"), name="code"),
        )
    )
    run(recipe, tmp_path / "out", shard_bytes=4000, workers=2)
    directory = ShardDirectory.open(tmp_path / "out")
    found = Counter[str]()
    for index, row in directory.documents():
        shard = directory.shard(index)
        assert shard.content(row).tobytes().decode().startswith(shard.source(row))
        found[shard.source(row)] += 1
    taken = 0
    for count in range(400):
        taken += len(f"web {count} " * 11)
        if taken > 20_000:
            break
    assert found == {"web": count, "code": 300}
    # Both are in (nearly) every shard.
    assert sum(len(set(directory.shard(i).batch.column("source").to_pylist())) == 2 for i in range(len(directory))) > 8


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=8),
    sources=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    total=st.none() | st.integers(1, 60),
    caps=st.dictionaries(st.integers(0, 2), st.integers(1, 30), max_size=3),
    guess=st.integers(0, 20),
)
def test_limits_in_waves_take_what_a_plain_loop_takes(
    sizes: list[list[int]], sources: list[int], total: int | None, caps: dict[int, int], guess: int
) -> None:
    order = sorted(sources[: len(sizes)])
    tasks = [_Task(index=index, name="t", key=str(index), source=order[index]) for index in range(len(sizes))]
    for task in tasks:
        # The task is frozen.
        object.__setattr__(task, "guess", guess)
    taken, ended, first_fails = dict.fromkeys(range(3), 0), set[int](), False
    expected: list[list[int]] = [[] for _ in sizes]
    for task in tasks:
        for size in sizes[task.index]:
            if task.source in ended:
                break
            over_all = total is not None and sum(taken.values()) + size > total
            if over_all or taken[task.source] + size > caps.get(task.source, 10**9):
                # Where nothing has been taken yet, the limit is too small for anything.
                first_fails |= not (sum(taken.values()) if over_all else taken[task.source])
                ended |= {0, 1, 2} if over_all else {task.source}
                break
            taken[task.source] += size
            expected[task.index].append(size)
    waves = Waves(tasks, Limits(total_bytes=total, of_source=caps))
    done: dict[int, ScatterRecord] = {}
    try:
        while wave := waves.next():
            for item in wave:
                done[item.index] = _record(sizes[item.index], item.limit_bytes)
            waves.take(done)
    except InputError:
        assert first_fails
        return
    assert not first_fails
    chosen = {task.index: task for task in waves.chosen}
    for index, sizes_taken in enumerate(expected):
        counts = chosen.get(index)
        record = None if counts is None else _record(sizes[index], counts.limit_bytes)
        assert (record.content_bytes if record is not None else 0) == sum(sizes_taken)
        assert (record.documents if record is not None else 0) == len(sizes_taken)
        assert record is None or done[index].serves(record.limit_bytes)


class _Task(ScatterTask):
    """A task that is expected to hold something else than it does."""

    guess: int

    @property
    def expected_bytes(self) -> int:
        return getattr(self, "guess", 1)


def _record(sizes: Sequence[int], limit: int | None) -> ScatterRecord:
    taken, beyond = list[int](), None
    for size in sizes:
        if limit is not None and sum(taken) + size > limit:
            beyond = Beyond(document_id="x", bytes=size)
            break
        taken.append(size)
    return ScatterRecord(
        spill="",
        spill_bytes=0,
        documents=len(taken),
        content_bytes=sum(taken),
        limit_bytes=limit,
        boot=None,
        beyond=beyond,
        sources=(),
        sub_runs=(),
        cells=0,
        starts=(),
    )


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_one_bad_file_fails_and_the_rest_is_finished(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in", files=6)
    good = (source / "03.jsonl").read_bytes()
    (source / "03.jsonl").write_bytes(good + b"\n{broken\n")
    options = {"shard_bytes": 2000, "workers": 1}
    with pytest.raises(TasksFailedError, match=r"03\.jsonl: line 151 is no JSON") as failed:
        run(source, tmp_path / "out", **options)
    assert len(failed.value.failures) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    records = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob(".work/scatter/*/rec*")}
    assert len(records) > 5
    (source / "03.jsonl").write_bytes(good)
    run(source, tmp_path / "out", **options)
    run(source, tmp_path / "clean", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path: Path) -> None:
    lines = json_lines(["one", "two"]).split(b"\n")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([lines[0], b"{broken", lines[1], b'{"text": null}']))
    result = run(tmp_path / "a.jsonl", tmp_path / "out", on_error=OnError.SKIP)
    assert {content for _, content in read_documents(tmp_path / "out")} == {b"one", b"two"}
    skipped = result.manifests[tmp_path / "out"].skipped
    assert sum(skip.count for skip in skipped.values()) == 2
    assert any(skip.bytes >= len(b"{broken") for skip in skipped.values())


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return a source and an output that has scattered everything and gathered nothing."""
    source = corpus(tmp_path / "in", files=4)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("blt_data.ingest._Run._gather", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", shard_bytes=5000, workers=1)
    return source, tmp_path / "out"


def spills_of(output: Path) -> list[Path]:
    return sorted(path for path in output.glob(".work/scatter/*/spill-*") if path.suffix != ".npy")


def test_damaged_spill_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = interrupted(tmp_path, monkeypatch)
    run(source, tmp_path / "clean", shard_bytes=5000, workers=1)
    for path in spills_of(output):
        path.write_bytes(b"\xff" * 400 + path.read_bytes()[400:])
    with pytest.raises(TasksFailedError, match=r"is damaged; delete .*\.work and run the same command again"):
        run(source, output, shard_bytes=5000, workers=1)
    # What the sentence says mends it, also where a shard was written from damaged bytes before the damage was seen.
    shutil.rmtree(output / ".work")
    run(source, output, shard_bytes=5000, workers=1)
    assert files_of(output) == files_of(tmp_path / "clean")


def test_spill_that_has_lost_its_end_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = interrupted(tmp_path, monkeypatch)
    first = spills_of(output)[0]
    first.write_bytes(first.read_bytes()[:-1])
    run(source, output, shard_bytes=5000, workers=1)
    run(source, tmp_path / "clean", shard_bytes=5000, workers=1)
    assert files_of(output) == files_of(tmp_path / "clean")


def test_spills_of_before_a_restart_of_the_machine_are_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = interrupted(tmp_path, monkeypatch)
    before = {path.name for path in output.glob(".work/scatter/*/spill-*")}
    monkeypatch.setattr("blt_data.records.boot_id", lambda: "another boot")
    monkeypatch.setattr("blt_data.scatter.boot_id", lambda: "another boot")
    seen = list[set[str]]()

    def look(*args: object) -> None:
        seen.append({path.name for path in output.glob(".work/scatter/*/spill-*")})
        raise KeyboardInterrupt

    monkeypatch.setattr("blt_data.ingest._Run._gather", look)
    with pytest.raises(KeyboardInterrupt):
        run(source, output, shard_bytes=5000, workers=1)
    assert len(before) == len(seen[0]) > 2
    assert not before & seen[0]
