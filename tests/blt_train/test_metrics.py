"""The metrics file: strict, told clearly when it is of another version, and cut back on resuming."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from tests.blt_train.records import evaluation_of, step_of, write_run

from blt_train import CheckpointError, read_metrics
from blt_train.metrics import METRICS_NAME, EvaluationMetrics, Metrics, StepMetrics, to_line, truncate_metrics
from blt_train.samples import SAMPLES_NAME, read_samples, sample_of, truncate_samples

LINES: list[Metrics] = [
    evaluation_of(0, 8.0, {"web": 7.0, "wiki": 9.0}),
    step_of(1),
    step_of(2, sources={"web": 0.25, "wiki": 0.75}),
    evaluation_of(2, 7.0),
    step_of(3),
]


def test_lines_are_read_as_written(tmp_path: Path) -> None:
    write_run(tmp_path, LINES)
    steps, evaluations = read_metrics(tmp_path)
    assert [*steps, *evaluations] == [LINES[1], LINES[2], LINES[4], LINES[0], LINES[3]]


@pytest.mark.parametrize(("step", "kept"), [(-1, 0), (0, 1), (1, 2), (2, 4), (3, 5), (9, 5)])
def test_cutting_after_a_step_keeps_the_bytes_before(step: int, kept: int, tmp_path: Path) -> None:
    write_run(tmp_path, LINES)
    with (tmp_path / METRICS_NAME).open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # a process was killed here
    truncate_metrics(tmp_path, step)
    assert (tmp_path / METRICS_NAME).read_text(encoding="utf-8") == "".join(map(to_line, LINES[:kept]))


def test_samples_are_cut_with_their_step(tmp_path: Path) -> None:
    write_run(tmp_path, LINES, prompts=["a", "b"])
    assert [(sample.step, sample.prompt) for sample in read_samples(tmp_path)] == [
        (0, "a"),
        (0, "b"),
        (2, "a"),
        (2, "b"),
    ]
    truncate_samples(tmp_path, 1)
    assert [sample.step for sample in read_samples(tmp_path)] == [0, 0]
    (tmp_path / SAMPLES_NAME).write_text('{"step": 0}\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"samples\.jsonl: line 1 is no sample; delete the line"):
        truncate_samples(tmp_path, 1)


def test_missing_files_are_left_missing(tmp_path: Path) -> None:
    truncate_metrics(tmp_path, 5)
    truncate_samples(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []
    assert read_metrics(tmp_path) == ((), ())


def test_files_of_another_version_are_told_so(tmp_path: Path) -> None:
    write_run(tmp_path, LINES)
    record = json.loads(to_line(step_of(1)))
    del record["flops"]
    with (tmp_path / METRICS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    told = r"metrics\.jsonl: line 6 has no flops: another version of blt-train wrote it; .* or move the file away"
    with pytest.raises(CheckpointError, match=told):
        read_metrics(tmp_path)
    record |= {"flops": 1, "luck": 2}
    (tmp_path / METRICS_NAME).write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="line 1 has luck, which is unknown: another version"):
        truncate_metrics(tmp_path, 5)


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000, to_line(step_of(1)).replace("1000", '"x"').encode()],
)
def test_lines_that_are_none_are_named(line: bytes, tmp_path: Path) -> None:
    write_run(tmp_path, LINES[:2])
    with (tmp_path / METRICS_NAME).open("ab") as file:
        file.write(line.strip() + b"\n")
    with pytest.raises(CheckpointError, match="line 3 is no metrics line; delete the line to go on"):
        read_metrics(tmp_path)


def test_a_step_that_was_not_finite_keeps_its_line(tmp_path: Path) -> None:
    write_run(tmp_path, [step_of(1, loss=math.nan, bpb=math.inf, gradient_norm=math.nan)])
    assert '"loss": null' in (tmp_path / METRICS_NAME).read_text(encoding="utf-8")
    (step,), _ = read_metrics(tmp_path)
    assert math.isnan(step.loss)


def test_samples_keep_exact_bytes() -> None:
    plain = sample_of(1, 0, "p", "été".encode(), "length")
    assert (plain.completion, plain.completion_hex) == ("été", None)
    broken = sample_of(1, 0, "p", b"\xffx", "end")
    assert (broken.completion, broken.completion_hex) == ("\ufffdx", "ff78")


def test_every_field_is_in_the_guide(repository: Path) -> None:
    guide = (repository / "docs" / "training.md").read_text(encoding="utf-8")
    fields = [field.name for kind in (StepMetrics, EvaluationMetrics) for field in dataclasses.fields(kind)]
    assert [name for name in fields if f"| `{name}` |" not in guide] == []
