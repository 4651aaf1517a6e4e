"""A run that is stopped and goes on with another number of processes: the same batches, the same losses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.blt_train.samples import assert_same_tensors, blt_config, section_tensors, without_times

from blt_train import evaluate, generate, read_metrics, train
from blt_train.checkpoint import Section, read_trainer_state
from blt_train.exchange import export_model

HELPER = "tests.blt_train.train_ranks"


def overrides_in(workplace: Path) -> list[str]:
    """Of all runs here: one sequence per micro batch suits one to eight processes."""
    return [
        f"data.train={workplace / 'patched'}",
        f"data.holdout={workplace / 'patched-holdout'}",
        "data.sequence_tokens=64",
        "batch.sequences_per_step=8",
        "batch.sequences_per_micro_batch=1",
        "optimizer.learning_rate=0.0003",
        "optimizer.ema_decay=0.9",
        "schedule.total_steps=24",
        "checkpoint.every=7",
        "evaluation.every=12",
    ]


def run_jobs(workplace: Path, repository: Path, *jobs: str) -> list[str]:
    """Run jobs, whose run directories are in the workplace; return the exit codes of each."""
    there = [str(workplace / job) for job in jobs]
    done = subprocess.run(
        [sys.executable, "-m", HELPER, *there, "--", "launch", "debug-blt", *overrides_in(workplace)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_close(run: Path, other: Path) -> None:
    """The same batches; losses and what follows from them within 1e-5."""
    rounded = {"loss", "bpb", "gradient_norm", "update_norm", "holdout_bpb", "holdout_loss"}
    for row, expected in zip(rows_of(run), rows_of(other), strict=True):
        assert {key: row[key] for key in row.keys() - rounded} == {
            key: expected[key] for key in expected.keys() - rounded
        }
        for key in rounded & row.keys():
            assert row[key] == pytest.approx(expected[key], rel=1e-5), (row["step"], key)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, steps and then evaluations, without what is measured."""
    steps, evaluations = read_metrics(run)
    return without_times([*steps, *evaluations])


def test_eight_then_two_then_four_processes_train_as_one(workplace: Path, repository: Path) -> None:
    whole = train(blt_config(workplace, "whole", *overrides_in(workplace)))
    codes = run_jobs(
        workplace,
        repository,
        "changed:8:2",
        # Two copies of the whole model; then two copies of two shards.
        "changed:2:6:SIGUSR1:parallel.shard_ranks=1",
        "changed:4:parallel.shard_ranks=2",
        "same:2",
        "again:2:2",
        "again:2",
    )
    assert codes == [str([143] * 8), str([75] * 2), str([0] * 4), "[0, 0]", "[143, 143]", "[0, 0]"]
    assert_close(workplace / "changed", workplace / "whole")
    assert read_trainer_state(workplace / "changed" / "latest").processes == 4
    # On as many processes as before nothing is rounded otherwise: the weights are the same, bit for bit.
    assert rows_of(workplace / "same") == rows_of(workplace / "again")
    for section in Section:
        tensors = [section_tensors(workplace / name / "latest", section) for name in ("same", "again", "changed")]
        assert_same_tensors(tensors[0], tensors[1])
        one = section_tensors(whole.checkpoint, section)
        assert all(torch.allclose(tensors[2][name], one[name], rtol=1e-3, atol=1e-5) for name in one)
    # What four processes wrote is a model like any other.
    figures = [evaluate(workplace / name, workplace / "patched-holdout").bpb for name in ("changed", "whole")]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    export_model(workplace / "changed", workplace / "exported")
    prompts = [bytes(generate(workplace / name, b"the cat", max_new_bytes=8)) for name in ("changed", "exported")]
    assert prompts[0] == prompts[1]
    exported = evaluate(workplace / "exported", workplace / "patched-holdout", sequence_tokens=64)
    assert exported.bpb == figures[0]
