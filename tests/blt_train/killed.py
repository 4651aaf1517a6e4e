"""A program that trains in forked processes, each killed by SIGKILL at a chosen file operation, then lets one finish.

    python killed.py KILL_POINTS RUN blt-train-arguments…

KILL_POINTS are numbers joined by commas. For each, training starts anew in directory RUN-<number>, dies at that file
operation (fsync, rename, link, removal), and is started again to its end. The interpreter with torch is loaded once.
Operations of the thread that writes checkpoints count too.
Prints how many file operations an undisturbed run takes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch._dynamo  # noqa: F401  # an optimizer loads it on first use; loaded here, every fork has it

from blt_train.cli import main
from blt_train.config_parsing import load_config
from blt_train.inputs import open_inputs

OPERATIONS = ("fsync", "replace", "rename", "symlink", "rmdir", "unlink")


class Counter:
    """Counts file operations, and kills the process when the count is reached."""

    def __init__(self, fatal: int) -> None:
        self.count = 0
        self._fatal = fatal

    def wrap(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return counted


def train(arguments: list[str], fatal: int, report: int | None = None) -> int:
    """Train in a forked process; return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    counter = Counter(fatal)
    for name in OPERATIONS:
        setattr(os, name, counter.wrap(getattr(os, name)))
    status = 1
    try:
        main(arguments, standalone_mode=False)
        if report is not None:
            os.write(report, str(counter.count).encode())
        status = 0
    finally:
        os._exit(status)


def run_all() -> None:
    """Train as the command line says."""
    points, run, *arguments = sys.argv[1:]
    # Compile the kernels once, before the first fork.
    inputs = open_inputs(load_config(arguments[1], [*arguments[2:], f"run={run}"]), verify=False)
    inputs.open_stream().sequences(0, 1)
    reading, writing = os.pipe()
    undisturbed = train([*arguments, f"run={run}-whole"], fatal=-1, report=writing)
    if undisturbed != 0:
        sys.exit("the undisturbed run failed")
    total = int(os.read(reading, 100))
    for point in map(int, points.split(",")):
        status = train([*arguments, f"run={run}-{point}"], fatal=point)
        if point <= total and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"the run was not killed at {point}")
        if train([*arguments, f"run={run}-{point}"], fatal=-1) != 0:
            sys.exit(f"the run killed at {point} did not resume")
    sys.stdout.write(f"operations {total}\n")


if __name__ == "__main__":
    run_all()
