"""Our datatrove blocks among datatrove's own, under datatrove's own executor, and `build_pipeline`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherQualityFilter, LambdaFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import JsonlWriter

from blt_data import InputError, ShardDirectory, build_pipeline
from blt_data.building import Pipeline
from blt_data.ingest import PrepareConfig, TasksFailedError, prepare
from blt_data.results import print_result

from .corpora import files_of, read_documents, write_parquet

GOOD = (
    "The river rises in the hills above the town and runs through a wide valley to the sea. In spring the snow melts, "
    "and the water of the river is cold and clear. The people of the valley have built mills along its banks, and it "
    "is said that there were once more than forty of them. Most have fallen into ruin, but a few of the old wheels "
    "still turn with the stream, and visitors come to look at them in the summer. To the north there is a forest of "
    "beech and oak, which belongs to the town, and which has been open to all since the beginning of the century. "
)
BAD = "buy now!!! ### $$$ ... " * 30


def corpus(folder: Path) -> Path:
    """Write three Parquet files, a third of whose texts no quality filter lets through."""
    folder.mkdir()
    for index in range(3):
        texts = [BAD if row % 3 == 0 else f"{GOOD}That was number {index} of {row}. " for row in range(60)]
        ids = [f"{index}-{row}" for row in range(60)]
        write_parquet(folder / f"{index}.parquet", texts, ids=ids, group=10)
    return folder


def texts_of(folder: Path) -> list[tuple[str, str]]:
    """Return (id, text) of every row, read by pyarrow alone."""
    tables = [pq.read_table(path, columns=["id", "text"]) for path in sorted(folder.glob("*.parquet"))]
    return [
        pair for table in tables for pair in zip(*(table[name].to_pylist() for name in ("id", "text")), strict=True)
    ]


def run_stages(pipeline: Pipeline, logs: Path, *, gather_tasks: int) -> None:
    """Run the three stages under datatrove's executor, each waiting for the one before."""
    first = LocalPipelineExecutor(pipeline.scatter, pipeline.scatter_tasks, workers=1, logging_dir=str(logs / "1"))
    second = LocalPipelineExecutor(pipeline.gather, gather_tasks, workers=1, logging_dir=str(logs / "2"), depends=first)
    LocalPipelineExecutor(pipeline.finish, 1, workers=1, logging_dir=str(logs / "3"), depends=second).run()


def test_steps_drop_and_alter_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = corpus(tmp_path / "in")
    write_parquet(source / "3.parquet", [f"The river has an address: someone.{row}@example.org" for row in range(9)])
    steps = [LambdaFilter(lambda document: document.text.startswith("The")), PIIFormatter(email_replacement="X")]
    result = build_pipeline(source, tmp_path / "out", steps=steps, shard_bytes=5000, workers=1).run()
    found = [content.decode() for _, content in read_documents(tmp_path / "out")]
    assert len(found) == 129
    assert found.count("The river has an address: X") == 9
    first, second = result.steps
    assert (first.documents_in, first.documents_out, second.documents_in, second.documents_out) == (189, 129, 129, 129)
    assert first.bytes_in - first.bytes_out == 60 * len(BAD)
    shorter = sum(len(f"someone.{row}@example.org") - 1 for row in range(9))
    assert second.bytes_in - second.bytes_out == shorter
    skipped = result.manifests[tmp_path / "out"].skipped
    assert [(skip.count, skip.bytes) for skip in skipped.values()] == [(60, 60 * len(BAD)), (0, shorter)]
    assert result.stats is not None
    assert "dropped" in result.stats.get_repr()
    print_result(result)
    assert "dropped by" in capsys.readouterr().out


def test_gopher_quality_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("spacy", reason="datatrove counts words with spacy")
    source = corpus(tmp_path / "in")
    pipeline = build_pipeline(source, tmp_path / "out", steps=[GopherQualityFilter()], shard_bytes=5000, workers=1)
    result = pipeline.run()
    # The filter itself says what must be left.
    rule = GopherQualityFilter()
    kept = {name: text for name, text in texts_of(source) if rule.filter(Document(text=text, id=name)) is True}
    assert 0 < len(kept) < 180
    assert {name: content.decode() for name, content in read_documents(tmp_path / "out")} == kept
    (step,) = result.steps
    assert (step.documents_in, step.documents_out) == (180, len(kept))
    dropped = result.manifests[tmp_path / "out"].skipped[f"dropped by {step.name}"]
    left_out = [text for name, text in texts_of(source) if name not in kept]
    assert (dropped.count, dropped.bytes) == (len(left_out), sum(len(text) for text in left_out))
    provenance = ShardDirectory.open(tmp_path / "out").manifest.provenance
    assert "GopherQualityFilter" in json.dumps(provenance["steps"])
    assert result.stats.stats[2].stats["dropped"].total == len(left_out)
    print_result(result)
    assert "dropped by" in capsys.readouterr().out


def test_stages_under_datatroves_executor_make_the_same_shards(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    steps = [LambdaFilter(lambda document: document.text.startswith("The")), PIIFormatter()]
    options: dict[str, Any] = {"shard_bytes": 4000, "holdout_fraction": 0.3, "deduplicate": True}
    build_pipeline(source, tmp_path / "run", steps=steps, workers=2, **options).run()
    expected = files_of(tmp_path / "run")
    assert len(expected) > 5
    for ranks in (1, 3, 40):
        pipeline = build_pipeline(source, tmp_path / str(ranks), steps=steps, **options)
        run_stages(pipeline, tmp_path / f"logs-{ranks}", gather_tasks=ranks)
        assert files_of(tmp_path / str(ranks)) == expected
    # Every stage, run again on what is complete, leaves it as it is.
    run_stages(pipeline, tmp_path / "logs-again", gather_tasks=2)
    assert files_of(tmp_path / "40") == expected


def test_stages_do_what_is_missing(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    prepare(PrepareConfig(source=str(source), output=tmp_path / "clean", shard_bytes=2000))
    pipeline = build_pipeline(source, tmp_path / "out", shard_bytes=2000)
    assert pipeline.scatter_tasks > 2
    for stage in (pipeline.gather, pipeline.finish):
        with pytest.raises(InputError, match="run the pipeline's first stage to its end"):
            LocalPipelineExecutor(stage, 1, logging_dir=str(tmp_path / "early"), workers=1).run()
    LocalPipelineExecutor(pipeline.scatter, 3, logging_dir=str(tmp_path / "x"), workers=1, local_tasks=2).run()
    with pytest.raises(InputError, match="is not finished"):
        LocalPipelineExecutor(pipeline.gather, 1, logging_dir=str(tmp_path / "early"), workers=1).run()
    run_stages(pipeline, tmp_path / "logs", gather_tasks=3)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def test_our_reader_before_a_writer_of_datatroves(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    pipeline = build_pipeline(source, tmp_path / "unused")
    reader = pipeline.scatter[0]
    writer = JsonlWriter(str(tmp_path / "lines"), compression=None)
    LocalPipelineExecutor(
        [reader, LambdaFilter(lambda document: document.metadata["row"] > 5), writer],
        pipeline.scatter_tasks,
        logging_dir=str(tmp_path / "logs"),
        workers=1,
    ).run()
    lines = [line for path in sorted((tmp_path / "lines").iterdir()) for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    expected = [pair for place, pair in enumerate(texts_of(source)) if place % 60 >= 5]
    assert [(record["id"], record["text"]) for record in records] == expected
    assert {record["metadata"]["source"] for record in records} == {"in"}


def test_a_reader_of_datatroves_before_our_writer(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    expected = sorted((name, text.encode()) for name, text in texts_of(source))
    outputs = []
    for tasks in (1, 2):
        reader = ParquetReader(str(source), doc_progress=False)
        output = tmp_path / str(tasks)
        pipeline = build_pipeline(reader, output, tasks=tasks, expected_bytes=100_000, shard_bytes=9000)
        run_stages(pipeline, tmp_path / f"logs-{tasks}", gather_tasks=2)
        assert sorted(read_documents(output)) == expected
        outputs.append(read_documents(output))
    # The order is that of the seed, not that of the ranks.
    assert outputs[0] == outputs[1]
    assert outputs[0] != expected
    pipeline = build_pipeline(
        [ParquetReader(str(source)), LambdaFilter(lambda document: document.text.startswith("The"))],
        tmp_path / "run",
        tasks=2,
        workers=1,
    )
    assert pipeline.run().manifests[tmp_path / "run"].documents == 120


def test_gathered_documents_before_a_writer_of_datatroves(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    pipeline = build_pipeline(source, tmp_path / "out", shard_bytes=3000)
    LocalPipelineExecutor(pipeline.scatter, pipeline.scatter_tasks, logging_dir=str(tmp_path / "l"), workers=1).run()
    writer = JsonlWriter(str(tmp_path / "lines"), compression=None)
    LocalPipelineExecutor([pipeline.gather[0], writer], 2, logging_dir=str(tmp_path / "g"), workers=1).run()
    run_stages(pipeline, tmp_path / "logs", gather_tasks=1)
    lines = [line for path in sorted((tmp_path / "lines").iterdir()) for line in path.read_text().splitlines()]
    found = [(record["id"], record["text"].encode()) for record in map(json.loads, lines)]
    assert found == read_documents(tmp_path / "out")


class Splitter(PipelineStep):  # type: ignore[misc]  # datatrove is untyped
    """Make several documents of one, as real steps do."""

    name = "splitter"
    type = "test"

    def __init__(self, metadata: bool = True) -> None:
        super().__init__()
        self.metadata = metadata

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data or ():
            for index, part in enumerate(document.text.split("|")):
                metadata = dict(document.metadata) if self.metadata else {}
                yield Document(text=part, id=f"{document.id}.{index}", metadata=metadata)


def test_a_function_is_a_step_too(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")

    def without_first_rows(data: DocumentsPipeline, rank: int, world_size: int) -> DocumentsPipeline:
        return (document for document in data or () if document.metadata["row"] > 20)

    pipeline = build_pipeline(source, tmp_path / "out", steps=[without_first_rows], workers=1)
    result = pipeline.run()
    assert len(read_documents(tmp_path / "out")) == 120
    assert result.steps[0].name.endswith("without_first_rows")
    with pytest.raises(InputError, match="other parameters"):
        build_pipeline(source, tmp_path / "out").run()


@pytest.mark.parametrize("seed", [0, None])
def test_several_documents_of_one(tmp_path: Path, seed: int | None) -> None:
    write_parquet(tmp_path / "a.parquet", ["a|b|c", "d", "e|f"], ids=["x", "y", "z"], group=1)
    build_pipeline(tmp_path / "a.parquet", tmp_path / "out", steps=[Splitter()], shuffle_seed=seed, shard_bytes=2).run()
    expected = [("x.0", b"a"), ("x.1", b"b"), ("x.2", b"c"), ("y.0", b"d"), ("z.0", b"e"), ("z.1", b"f")]
    found = read_documents(tmp_path / "out")
    assert (found if seed is None else sorted(found)) == expected


def test_a_step_that_loses_the_place_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a|b"], ids=["x"])
    with pytest.raises(TasksFailedError, match=r"document 'x\.0' lacks 'file_path' in its metadata"):
        build_pipeline(tmp_path / "a.parquet", tmp_path / "out", steps=[Splitter(metadata=False)]).run()


def test_another_step_is_another_job(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")

    def longer_than(size: int) -> Callable[[Document], bool]:
        return lambda document: len(document.text) > size

    for steps in ([LambdaFilter(longer_than(300))], [LambdaFilter(longer_than(300))]):
        build_pipeline(source, tmp_path / "out", steps=steps).run()
    for other in ([LambdaFilter(longer_than(600))], [LambdaFilter(lambda document: True)], [], [GopherQualityFilter()]):
        with pytest.raises(InputError, match="already complete with other parameters"):
            build_pipeline(source, tmp_path / "out", steps=other).run()


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(InputError, match="no option 'shard_size'"):
        build_pipeline(tmp_path / "a.parquet", tmp_path / "out", shard_size=5)
    with pytest.raises(InputError, match="give tasks="):
        build_pipeline(ParquetReader(str(tmp_path)), tmp_path / "out")
    with pytest.raises(InputError, match="a limit needs the run"):
        _ = build_pipeline(tmp_path / "a.parquet", tmp_path / "out", limit_bytes=5).scatter
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        _ = build_pipeline(tmp_path / "a.parquet", tmp_path / "other").scatter


def test_reading_shards_imports_no_datatrove() -> None:
    code = (
        "import sys, blt_data, blt_data.cli; "
        "bad = {'datatrove', 'ray', 'torch', 'huggingface_hub'} & set(sys.modules); "
        "assert not bad, bad; blt_data.build_pipeline; assert 'datatrove' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
