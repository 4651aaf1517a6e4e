"""A program that trains in jobs of forked processes, one job after the other, some stopped by signals.

    python -m tests.blt_train.train_ranks JOB… -- blt-train-arguments…

JOB is RUN:PROCESSES, RUN:PROCESSES:STEPS or RUN:PROCESSES:STEPS:SIGNAL, followed by any number of :KEY=VALUE. The job
trains in directory RUN, to the end or until it has done so many steps, when every process gets the signal (SIGTERM
unless said otherwise) after a random part of a second. Prints the exit codes of each job. The interpreter with torch is
loaded once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from tests.blt_train.ranks import collect, kill_others, start_ranks

import blt_train.trainer  # noqa: F401  # loaded here, every fork has it
from blt_train.cli import main
from blt_train.config_parsing import load_config
from blt_train.inputs import open_inputs
from blt_train.metrics import read_metrics

#: Seconds after which a job counts as hanging.
PATIENCE = 200.0


def train(arguments: list[str]) -> None:
    """One process's part; what it prints is no concern of who runs this program."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(arguments, standalone_mode=False)


def run_job(job: str, arguments: list[str]) -> list[int]:
    """Run one job to its end; return the exit codes."""
    run, processes, *rest = job.split(":")
    overrides = [item for item in rest if "=" in item]
    words = [item for item in rest if "=" not in item]
    children = start_ranks(int(processes), lambda: train([*arguments, f"run={run}", *overrides]))
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while words and len(codes) < len(children):
        wait(children, codes, deadline)
        if len(read_metrics(run)[0]) >= int(words[0]):
            time.sleep(random.random() / 2)
            for child in children:
                os.kill(child, signal.Signals[words[1] if len(words) > 1 else "SIGTERM"])
            break
    while len(codes) < len(children):
        wait(children, codes, deadline)
    return [codes[child] for child in children]


def wait(children: list[int], codes: dict[int, int], deadline: float) -> None:
    """Wait a moment and note which processes have ended."""
    time.sleep(0.01)
    collect(children, codes)
    if time.monotonic() > deadline:
        kill_others(children, codes)
        sys.exit("a job hangs")


def run_all() -> None:
    """Run all jobs."""
    split = sys.argv.index("--")
    arguments = sys.argv[split + 1 :]
    # Compile the kernels once, before the first fork.
    open_inputs(load_config(arguments[1], [*arguments[2:], "run=unused"]), verify=False)
    for job in sys.argv[1:split]:
        sys.stdout.write(f"{run_job(job, arguments)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run_all()
