"""Several processes: the losses of one, resuming on another number, and one sentence when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.blt_train.jobs import processes_of
from tests.blt_train.samples import blt_config, command, run_command, without_times

from blt_train import read_metrics, train
from blt_train.metrics import StepMetrics


def assert_close(steps: tuple[StepMetrics, ...], others: tuple[StepMetrics, ...]) -> None:
    """The same batches, and the same losses to rounding."""
    assert [item.loss for item in steps] == pytest.approx([item.loss for item in others], rel=1e-5)
    rounded = ("loss", "bpb", "gradient_norm", "update_norm")
    for mine, other in zip(without_times(steps), without_times(others), strict=True):
        assert {key: mine[key] for key in mine if key not in rounded} == {
            key: other[key] for key in other if key not in rounded
        }


def test_two_processes_give_the_losses_of_one_and_resume_as_one(workplace: Path) -> None:
    overrides = ["schedule.total_steps=8", "batch.sequences_per_micro_batch=1", "checkpoint.every=4"]
    holdout = f"data.holdout={workplace / 'patched-holdout'}"
    alone = train(blt_config(workplace, "alone", *overrides, holdout))
    arguments = ["launch", "debug-blt", f"run={workplace / 'two'}", f"data.train={workplace / 'patched'}", holdout]
    done = run_command(*arguments, *overrides, "--nproc-per-node", "2")
    assert done.returncode == 0, done.stderr
    assert "torchrun --standalone --nproc-per-node=2 -m blt_train launch" in done.stderr
    steps, evaluations = read_metrics(workplace / "two")
    assert_close(steps, alone.steps)
    assert [item.holdout_bpb for item in evaluations] == pytest.approx(
        [item.holdout_bpb for item in alone.evaluations], rel=1e-5
    )

    # From the middle, in one process: the same batches follow.
    run = workplace / "two"
    (run / "latest").unlink()
    (run / "latest").symlink_to("checkpoints/step-00000004")
    resumed = train(blt_config(workplace, "two", *overrides, holdout))
    assert resumed.is_finished
    assert_close(resumed.steps, alone.steps)


def test_a_killed_process_ends_the_job(workplace: Path) -> None:
    run = workplace / "run"
    arguments = ["launch", "debug-blt", f"run={run}", f"data.train={workplace / 'patched'}", "--nproc-per-node", "2"]
    job = subprocess.Popen(
        command(*arguments, "schedule.total_steps=100000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)[0]) < 3:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    ranks = processes_of(run)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    _, told = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "error: process 1 of 2 was killed by SIGKILL" in told
    assert "Traceback" not in told
    assert not processes_of(run)


def test_bad_input_in_a_process_is_told_in_one_sentence(workplace: Path) -> None:
    run = workplace / "run"
    schedule = ["schedule.total_steps=2", "schedule.warmup_steps=1"]
    train(blt_config(workplace, "run", *schedule))
    before = (run / "metrics.jsonl").read_bytes()
    arguments = ["launch", "debug-blt", f"run={run}", f"data.train={workplace / 'patched'}", "seed=5"]
    done = run_command(*arguments, *schedule, "--nproc-per-node", "2")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("the same by hand")]
    assert len(errors) == 1, done.stderr
    assert "was trained with seed = 0, the config says 5" in errors[0]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_cannot_be_divided_is_refused_before_any_process_starts(workplace: Path) -> None:
    done = subprocess.run(
        command("launch", "debug-blt", f"data.train={workplace / 'patched'}", "--nproc-per-node", "3"),
        capture_output=True,
        text=True,
        cwd=workplace,
        check=False,
    )
    assert done.returncode == 1
    assert "no multiple of 3 process(es)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (workplace / "runs").exists()
