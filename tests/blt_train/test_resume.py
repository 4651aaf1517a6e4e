"""Killed anywhere and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.blt_train.samples import assert_same_run, blt_config, byte_config, command

from blt_train import generate, load_config, read_metrics, train
from blt_train.checkpoint import read_trainer_state
from blt_train.errors import CheckpointError
from blt_train.metrics import EvaluationMetrics, MetricsWriter, to_line

HELPER = Path(__file__).with_name("killed.py")


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a running training has written so many steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"training ended early: {process.communicate()}")
        if (run / "metrics.jsonl").exists() and len(read_metrics(run)[0]) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("training took no steps")


def start(config: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("launch", config, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("kind", ["bytes", "patched"])
def test_killed_at_file_operations(kind: str, workplace: Path) -> None:
    points = range(1, 70, 6) if kind == "bytes" else (20, 33, 47)
    arguments = [
        "launch",
        "debug-entropy" if kind == "bytes" else "debug-blt",
        f"data.train={workplace / kind}",
        f"data.holdout={workplace / kind}-holdout",
        "schedule.total_steps=6",
        "checkpoint.every=2",
        "checkpoint.keep_last=1",
        "evaluation.every=3",
    ]
    done = subprocess.run(
        [sys.executable, str(HELPER), ",".join(map(str, points)), str(workplace / "run"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    operations = int(done.stdout.split()[-1])
    # The points lie among those of the run: checkpoints, their clean-up and the metrics in between.
    assert points[len(points) // 2] < operations
    assert len(read_metrics(workplace / "run-whole")[0]) == 6
    for point in points:
        assert_same_run(workplace / f"run-{point}", workplace / "run-whole")
        names = {path.name for path in (workplace / f"run-{point}" / "checkpoints").iterdir()}
        assert names == {"step-00000006"}


def test_killed_from_outside(workplace: Path) -> None:
    overrides = ["schedule.total_steps=150", "checkpoint.every=7", f"data.holdout={workplace / 'bytes-holdout'}"]
    process = start("debug-entropy", f"run={workplace / 'killed'}", f"data.train={workplace / 'bytes'}", *overrides)
    wait_for_steps(workplace / "killed", 10, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    result = train(byte_config(workplace, "killed", *overrides))
    assert result.is_finished
    train(byte_config(workplace, "whole", *overrides))
    assert_same_run(workplace / "killed", workplace / "whole")


def test_sigterm_saves_then_stops(workplace: Path) -> None:
    overrides = ["schedule.total_steps=70", "checkpoint.every=1000"]
    process = start("debug-blt", f"run={workplace / 'stopped'}", f"data.train={workplace / 'patched'}", *overrides)
    wait_for_steps(workplace / "stopped", 3, process)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM after step" in told
    step = len(read_metrics(workplace / "stopped")[0])
    assert (workplace / "stopped" / "latest").resolve().name == f"step-{step:08d}"
    assert step < 70
    train(blt_config(workplace, "stopped", *overrides))
    train(blt_config(workplace, "whole", *overrides))
    assert_same_run(workplace / "stopped", workplace / "whole")


@pytest.mark.parametrize("lost", ["missing", "directory", "file"])
def test_checkpoints_survive_the_loss_of_latest(workplace: Path, lost: str) -> None:
    """Copying a run may drop its link, or put a copy in its place: the checkpoints themselves must stay."""
    overrides = ["schedule.total_steps=4", "checkpoint.every=2"]
    before = train(byte_config(workplace, "run", *overrides))
    latest = workplace / "run" / "latest"
    kept = {path: path.stat().st_mtime_ns for path in (workplace / "run" / "checkpoints").rglob("*")}
    latest.unlink()
    if lost == "directory":
        shutil.copytree(workplace / "run" / "checkpoints" / "step-00000004", latest)
    elif lost == "file":
        latest.touch()
    if lost != "missing":
        with pytest.raises(CheckpointError, match=r"latest: is no symbolic link.*delete it to go on"):
            train(byte_config(workplace, "run", *overrides))
    else:
        assert train(byte_config(workplace, "run", *overrides)) == before
    assert {path: path.stat().st_mtime_ns for path in (workplace / "run" / "checkpoints").rglob("*")} == kept


def test_other_files_among_the_checkpoints_stay(workplace: Path) -> None:
    train(byte_config(workplace, "run", "schedule.total_steps=4", "checkpoint.every=2"))
    folder = workplace / "run" / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / "step-best")
    (folder / "step-notes.txt").write_text("my notes")
    train(byte_config(workplace, "run", "schedule.total_steps=4", "checkpoint.every=1", "checkpoint.keep_last=1"))
    (folder / "step-00000005").mkdir()
    train(byte_config(workplace, "run", "schedule.total_steps=4"))
    assert {path.name for path in folder.iterdir()} == {
        "step-00000002",
        "step-00000004",
        "step-best",
        "step-notes.txt",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"processes": None},
        {"nonfinite_steps": 1.5},
        {"data": {"kind": "bytes", "sources": {}}},
        {"step": "x"},
        {"step": -1},
        {"step": True},
        {"config": None},
        {"config": {}},
        {"data": []},
        {"data": {}},
        {"data": {"kind": "bytes", "sources": {"a": {"fingerprint": 3, "provenance": {}, "weight": 1.0}}}},
        {"data": {"kind": "bytes", "sources": {"a": {"fingerprint": "f", "provenance": [], "weight": 1.0}}}},
        {"entropy_model": 5},
        {"packages": "x"},
    ],
)
def test_trainer_state_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    state: dict[str, object] = {
        "format_version": 2,
        "step": 3,
        "processes": 4,
        "nonfinite_steps": 1,
        "nonfinite_in_row": 0,
        "config": {"data": {"sequence_tokens": 16}},
        "data": {"kind": "bytes", "sources": {"a": {"fingerprint": "f", "provenance": {}, "weight": 1.0}}},
        "entropy_model": None,
        "packages": {},
    }
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps(state))
    assert read_trainer_state(tmp_path).step == 3
    path.write_text(json.dumps(state | changes))
    with pytest.raises(CheckpointError, match=r"trainer\.json: is damaged"):
        read_trainer_state(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"trainer\.json: is damaged"):
        read_trainer_state(tmp_path)


def evaluation_metrics() -> EvaluationMetrics:
    return EvaluationMetrics(
        step=0,
        holdout_bpb=1.0,
        holdout_loss=1.0,
        holdout_bytes=1,
        holdout_documents=1,
        holdout_bpb_by_source=None,
        holdout_seconds=1.0,
    )


@pytest.mark.parametrize("line", ["x", "[]", "3", "{}", "[" * 100_000, '{"step": "x"}', '{"holdout_bpb": true}'])
def test_line_that_is_no_metrics_is_named(tmp_path: Path, line: str) -> None:
    good = evaluation_metrics()
    names = [field.name for field in dataclasses.fields(EvaluationMetrics)]
    if line.startswith("{") and line != "{}":
        line = json.dumps({name: getattr(good, name) for name in names} | json.loads(line))
    (tmp_path / "metrics.jsonl").write_text(to_line(good) + line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is no metrics line"):
        read_metrics(tmp_path)


def test_config_of_the_run_resumes_it(workplace: Path) -> None:
    result = train(byte_config(workplace, "run", "schedule.total_steps=4"))
    assert train(load_config(workplace / "run" / "config.yaml")) == result


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk for tests")
def test_full_disk_names_the_metrics_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = evaluation_metrics()
    with pytest.raises(OSError, match="No space left on device") as caught, MetricsWriter(tmp_path) as writer:
        writer.write(metrics)
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("scheme", [None, [], {"scheme": "nope"}])
def test_checkpoint_without_a_patch_scheme_generates_nothing(workplace: Path, scheme: object) -> None:
    checkpoint = train(blt_config(workplace, "run", "schedule.total_steps=1")).checkpoint
    state = json.loads((checkpoint / "trainer.json").read_text())
    (source,) = state["data"]["sources"].values()
    source["provenance"]["scheme"] = scheme
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"trainer\.json: names no patch scheme"):
        generate(workplace / "run", b"a")
