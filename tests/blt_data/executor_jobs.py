"""What the tests of executors run in workers, which import it by name."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blt_data import InputError
from blt_data.executors import Report, TaskFunction


@dataclass(frozen=True)
class Task:
    """Does at its n-th attempt what the n-th letter says.

    `r` returns, `e` raises, `k` is killed, `x` exits the process, `q` calls sys.exit, `i` finds its input at fault.
    """

    number: int
    script: str
    folder: Path
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    number: int
    process: int
    setups: int


def attempts_of(folder: Path, number: int) -> list[int]:
    """Return the process ids of a task's attempts."""
    path = folder / f"task-{number}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def act(setups: list[int], task: Task, report: Report) -> Result:
    with (task.folder / f"task-{task.number}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    letter = task.script[min(len(attempts_of(task.folder, task.number)), len(task.script)) - 1]
    report(task.number, 1, 10 * task.number)
    time.sleep(task.seconds)
    if letter == "e":
        raise OSError(5, "the disk is tired", f"file-{task.number}")
    if letter == "k":
        os.kill(os.getpid(), signal.SIGKILL)
    if letter == "x":
        os._exit(7)
    if letter == "q":
        sys.exit("enough")
    if letter == "i":
        raise InputError(f"file-{task.number}: row 3 is bad; mend it")
    report(1000, 0, 0)
    return Result(task.number, os.getpid(), len(setups))


def setup(folder: Path) -> TaskFunction[Task, Result]:
    with (folder / "setups").open("a") as file:
        file.write(f"{os.getpid()}\n")
    setups = [int(line) for line in (folder / "setups").read_text().split()]
    return partial(act, [process for process in setups if process == os.getpid()])


def broken_setup(how: str, folder: Path) -> TaskFunction[Task, Result]:
    """Fail in one of the workers, or in all."""
    if how == "input":
        raise InputError("the model is no model; name another")
    if how == "raise":
        raise RuntimeError("no such device")
    if how == "exit":
        os._exit(0)
    if os.environ["WORKER"] == how:
        os.kill(os.getpid(), signal.SIGKILL)
    return setup(folder)


def setup_function(function: Callable[..., object]) -> Callable[..., object]:
    return function


def environment(number: int) -> dict[str, str]:
    return {"WORKER": str(number)}


def worker_variable(task: int, report: Report) -> str:
    time.sleep(0.1)
    return os.environ["WORKER"]


def generator(task: int, report: Report) -> object:
    """Return what cannot be pickled."""
    return (number for number in range(3))


def leave_thread(task: int, report: Report) -> int:
    """Leave a thread behind that reports when the task has long ended."""

    def late() -> None:
        time.sleep(0.3)
        report(1_000_000, 0, 0)

    report(1, 0, 0)
    threading.Thread(target=late, daemon=True).start()
    time.sleep(0.5 * task)
    return task


def talk(task: int, report: Report) -> str:
    sys.stdout.write("a task says something\n")
    sys.stdout.flush()
    return sys.stdin.read()


def hold_interpreter(task: Path, report: Report) -> None:
    """Tell the process id and then never let another thread run."""
    task.write_text(str(os.getpid()))
    re.match("(a+)+$", "a" * 64 + "b")


def wait_long(task: Path, report: Report) -> None:
    task.write_text(str(os.getpid()))
    time.sleep(600)
