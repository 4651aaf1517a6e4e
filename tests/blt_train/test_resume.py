"""Killed anywhere and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.blt_train.samples import assert_same_run, blt_config, byte_config, command

from blt_train import load_config, read_metrics, train

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


def test_config_of_the_run_resumes_it(workplace: Path) -> None:
    result = train(byte_config(workplace, "run", "schedule.total_steps=4"))
    assert train(load_config(workplace / "run" / "config.yaml")) == result
