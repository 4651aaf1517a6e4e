"""The heartbeat of a run in a log, and its bar on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.blt_train.records import evaluation_of, step_of
from tests.blt_train.samples import command

from blt_data.progress import INTERVAL_VARIABLE
from blt_train.cli import main
from blt_train.display import TrainingDisplay


def test_a_line_says_where_the_run_is() -> None:
    display = TrainingDisplay("training r", 1000)
    assert display.status() == "no step yet"
    display(evaluation_of(0, 8.25))
    assert display.status() == "held out 8.2500 bits/byte, no step yet"
    for step in (1, 2):
        display(step_of(step, seconds=2.0, data_wait=0.5, mfu=0.413))
    line = display.status()
    assert line.startswith("step 2/1,000 (0%), loss 2.5000, 3.6000 bits/byte, held out 8.2500 at step 0, ")
    assert re.search(r", [0-9.]+ [kMGT]?B/s, data wait 25%, MFU 41\.3%, .*[0-9]+:[0-9]+:[0-9]+ left$", line)
    # Nothing came since that line.
    assert re.search(r"no step for 0:00:0[0-9]$", display.status())
    display(step_of(3, loss=float("nan"), bpb=float("nan")))
    assert "loss nan" in display.status()
    display(step_of(4, nonfinite_steps=3))
    assert ", 3 steps skipped as not finite, " in display.status()


def test_lines_come_also_while_nothing_moves(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, "0.01")
    written = threading.Event()
    write = TrainingDisplay._write

    def watch(display: TrainingDisplay) -> None:
        write(display)
        written.set()

    monkeypatch.setattr(TrainingDisplay, "_write", watch)
    with TrainingDisplay("training r", 10) as display:
        assert written.wait(60)
        display(step_of(1))
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "training r: no step yet"
    assert lines[-1].startswith("training r: step 1/10 (10%)")


def test_a_log_gets_lines_and_a_terminal_a_bar(workplace: Path) -> None:
    arguments = ["launch", "debug-entropy", f"data.train={workplace / 'bytes'}", "schedule.total_steps=3"]
    log = CliRunner().invoke(main, [*arguments, f"run={workplace / 'log'}"])
    assert f"training {workplace / 'log'}: step 3/3 (100%), loss " in log.stderr
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    outside, inside = pty.openpty()
    with subprocess.Popen(
        command(*arguments, f"run={workplace / 'bar'}"), stdout=subprocess.PIPE, stderr=inside, env=environment
    ) as job:
        os.close(inside)
        shown = b""
        try:
            while data := os.read(outside, 65536):
                shown += data
        except OSError:  # the other side has closed the terminal
            pass
        job.communicate()
    os.close(outside)
    assert job.returncode == 0
    assert b"3/3" in shown
    assert b"bits/byte" in shown
    assert b"step 3/3 (100%)" not in shown
