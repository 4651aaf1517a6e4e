"""Local executors: nothing is lost, whatever dies; nothing outlives the run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_data import InputError
from blt_data.executors import LocalExecutor, TaskFailure
from blt_data.executors.schedule import Schedule

from . import executor_jobs as jobs
from .executor_jobs import Task, attempts_of

ATTEMPTS = 3


@pytest.fixture(autouse=True)
def workers_find_the_tests(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository))


def run_tasks(
    executor: LocalExecutor, tasks: list[Task], folder: Path
) -> tuple[tuple[TaskFailure, ...], list[jobs.Result], list[int]]:
    """Run tasks; return failures, results in order of arrival and the sums of progress."""
    results: list[jobs.Result] = []
    sums = [0, 0, 0]

    def keep(index: int, result: jobs.Result) -> None:
        assert result.number == tasks[index].number
        results.append(result)

    def count(*amounts: int) -> None:
        for place, amount in enumerate(amounts):
            sums[place] += amount

    failures = executor.run(
        partial(jobs.setup, folder),
        tasks,
        names=[f"task {task.number}" for task in tasks],
        on_progress=count,
        on_result=keep,
    )
    return failures, results, sums


def expected_attempts(script: str) -> tuple[int, bool]:
    """Return how often a task is tried by its script, and whether it then succeeds."""
    for tried in range(1, ATTEMPTS + 1):
        letter = script[min(tried, len(script)) - 1]
        if letter in "ri":
            return tried, letter == "r"
    return ATTEMPTS, False


def is_worker(process: psutil.Process) -> bool:
    """Return whether it is a worker that lives; what other tests left as a zombie is none."""
    try:
        return "worker-" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # of which a zombie is one
        return False


def no_workers_left() -> bool:
    """Return whether this process has no child, after waiting a little for the last ones to end."""
    for _ in range(100):
        if not any(is_worker(child) for child in psutil.Process().children(recursive=True)):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("workers", "letters"), [(1, "rrrei"), (4, "rrrrekxqi")])
def test_whatever_attempts_do_every_task_ends_once(tmp_path: Path, workers: int, letters: str) -> None:
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    scripts = ["".join(generator.choices(letters, k=generator.randint(1, 4))) for _ in range(24)]
    tasks = [Task(number, script, tmp_path) for number, script in enumerate(scripts)]
    failures, results, sums = run_tasks(LocalExecutor(workers, pause=0.01, attempts=ATTEMPTS), tasks, tmp_path)
    where = f"seed {seed}"
    good = [number for number, script in enumerate(scripts) if expected_attempts(script)[1]]
    assert sorted(result.number for result in results) == good, where
    assert [failure.index for failure in failures] == [n for n in range(len(tasks)) if n not in good], where
    for number, script in enumerate(scripts):
        assert len(attempts_of(tmp_path, number)) == expected_attempts(script)[0], where
    for failure in failures:
        assert failure.attempts == expected_attempts(scripts[failure.index])[0], where
        assert failure.name == f"task {failure.index}"
    # What failed attempts reported was taken back.
    assert sums == [sum(good) + 1000 * len(good), len(good), 10 * sum(good)], where
    assert no_workers_left()


def test_failures_say_what_happened(tmp_path: Path) -> None:
    scripts = {"k": "killed by signal 9 (SIGKILL), perhaps for lack of memory", "x": "ended with status 7"}
    scripts |= {"e": "file-2: the disk is tired", "q": "SystemExit: enough", "i": "file-4: row 3 is bad; mend it"}
    tasks = [Task(number, script, tmp_path) for number, script in enumerate([*scripts, "r"])]
    failures, results, _ = run_tasks(LocalExecutor(2, pause=0.01), tasks, tmp_path)
    assert [result.number for result in results] == [5]
    for failure, (script, message) in zip(failures, scripts.items(), strict=True):
        assert message in failure.message
        assert failure.attempts == (1 if script == "i" else 3)
        assert str(failure).startswith(f"{failure.name}: {failure.message}")
        assert ("(tried 3 times)" in str(failure)) == (script != "i")


def test_workers_are_set_up_once_and_tasks_start_in_order(tmp_path: Path) -> None:
    tasks = [Task(number, "r", tmp_path, seconds=0.02) for number in range(20)]
    failures, results, _ = run_tasks(LocalExecutor(3), tasks, tmp_path)
    assert failures == ()
    processes = {result.process for result in results}
    assert 2 <= len(processes) <= 3
    assert os.getpid() not in processes
    assert {result.setups for result in results} == {1}
    for process in processes:
        own = [result.number for result in results if result.process == process]
        assert own == sorted(own)


def test_one_worker_runs_in_this_process(tmp_path: Path) -> None:
    tasks = [Task(number, "er", tmp_path) for number in range(3)]
    failures, results, _ = run_tasks(LocalExecutor(1, pause=0.01), tasks, tmp_path)
    assert failures == ()
    assert {result.process for result in results} == {os.getpid()}
    with pytest.raises(SystemExit, match="enough"):
        run_tasks(LocalExecutor(1), [Task(9, "q", tmp_path)], tmp_path)


def test_workers_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    tasks = [Task(number, "r", tmp_path, seconds=0.1) for number in range(24)]
    ended = threading.Event()
    kills = 0

    def kill_workers() -> None:
        nonlocal kills
        while not ended.wait(random.uniform(0.2, 0.6)):
            children = psutil.Process().children()
            if children:
                random.choice(children).kill()
                kills += 1

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        # So many attempts and places that chance cannot use them up.
        failures, results, sums = run_tasks(LocalExecutor(3, pause=0.01, attempts=50), tasks, tmp_path)
    finally:
        ended.set()
        killer.join()
    assert failures == ()
    assert Counter(result.number for result in results) == Counter(range(24))
    assert sums == [sum(range(24)) + 24_000, 24, 10 * sum(range(24))]
    assert kills


def test_workers_have_environments_of_their_own(tmp_path: Path) -> None:
    executor = LocalExecutor(3, worker_environment=jobs.environment)
    seen: set[str] = set()
    executor.run(
        partial(jobs.setup_function, jobs.worker_variable),
        range(9),
        names=[str(n) for n in range(9)],
        on_result=lambda index, result: seen.add(str(result)),
    )
    assert seen == {"0", "1", "2"}
    alone = LocalExecutor(1, worker_environment=jobs.environment)
    assert alone.run(partial(jobs.setup_function, jobs.worker_variable), [0], names=["0"]) == ()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("input", "^the model is no model; name another$"),
        ("raise", "^no worker could be set up: RuntimeError: no such device$"),
        ("exit", "^no worker could be set up: the process ended with status 0$"),
    ],
)
def test_a_setup_that_always_fails_ends_the_run(tmp_path: Path, how: str, message: str) -> None:
    tasks = [Task(number, "r", tmp_path) for number in range(4)]
    with pytest.raises(InputError, match=message):
        LocalExecutor(2).run(partial(jobs.broken_setup, how, tmp_path), tasks, names=["n"] * 4)
    assert no_workers_left()


def test_one_place_whose_setup_fails_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = [Task(number, "r", tmp_path, seconds=0.2) for number in range(12)]
    executor = LocalExecutor(2, worker_environment=jobs.environment)
    results: list[object] = []
    failures = executor.run(
        partial(jobs.broken_setup, "1", tmp_path),
        tasks,
        names=["n"] * 12,
        on_result=lambda index, result: results.append(result),
    )
    assert failures == ()
    assert len(results) == 12
    assert "worker 1 is given up: the process was killed by signal 9" in caplog.text


def test_what_cannot_be_sent_is_told(tmp_path: Path) -> None:
    unpicklable = (number for number in range(3))
    with pytest.raises(InputError, match="a task cannot be sent to a worker process"):
        LocalExecutor(2).run(
            partial(jobs.setup_function, jobs.worker_variable), [unpicklable, unpicklable], names=["a", "b"]
        )
    assert no_workers_left()
    failures = LocalExecutor(2, pause=0.01).run(
        partial(jobs.setup_function, jobs.generator), [0, 1], names=["a", "b"], on_result=lambda index, result: None
    )
    assert [failure.index for failure in failures] == [0, 1]
    assert "the result of a task cannot be sent" in failures[0].message


def test_threads_that_a_task_leaves_behind_count_for_no_other_task() -> None:
    total = 0

    def count(source_bytes: int, documents: int, content_bytes: int) -> None:
        nonlocal total
        total += source_bytes

    executor = LocalExecutor(1, worker_environment=jobs.environment)
    failures = executor.run(
        partial(jobs.setup_function, jobs.leave_thread), [0, 1], names=["a", "b"], on_progress=count
    )
    assert (failures, total) == ((), 2 + 1_000_000)


def test_workers_neither_read_standard_input_nor_write_to_standard_output(repository: Path) -> None:
    code = (
        "from functools import partial\nfrom tests.blt_data import executor_jobs as jobs\n"
        "from blt_data.executors import LocalExecutor\n"
        "LocalExecutor(2).run(partial(jobs.setup_function, jobs.talk), [0, 1], names='ab', "
        "on_result=lambda i, r: print(repr(r)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, input="typed", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "''\n''\n")
    assert done.stderr.count("a task says something") == 2


def test_an_error_of_the_caller_ends_the_workers(tmp_path: Path) -> None:
    def fail(index: int, result: object) -> None:
        raise ZeroDivisionError

    tasks = [Task(0, "r", tmp_path), Task(1, "r", tmp_path, seconds=60)]
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        LocalExecutor(2).run(partial(jobs.setup, tmp_path), tasks, names=["a", "b"], on_result=fail)
    assert time.monotonic() - start < 20
    assert no_workers_left()


MAIN = """
import sys
from blt_data.executors import LocalExecutor

class Square:
    def __init__(self, side):
        self.side = side

def area(square, report):
    return square.side ** 2

def setup():
    return area

print("main runs")
tasks = [Square(n) for n in range(5)]
found = {}
failures = LocalExecutor(2).run(setup, tasks, names="abcde", on_result=found.__setitem__)
print(failures, sorted(found.items()))
"""


@pytest.mark.parametrize("how", ["script", "-c", "stdin"])
def test_the_main_module_needs_no_guard_and_may_define_tasks(tmp_path: Path, how: str) -> None:
    script = tmp_path / "types.py"  # a name that hides a module of Python's own from whoever imports from here
    script.write_text(MAIN)
    command = {"script": [str(script)], "-c": ["-c", MAIN], "stdin": ["-"]}[how]
    done = subprocess.run(
        [sys.executable, "-P", *command], input=MAIN if how == "stdin" else None, capture_output=True, text=True,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "main runs\n() [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]\n"


WAITER = """
import sys
from functools import partial
from pathlib import Path
from blt_data.executors import LocalExecutor
from tests.blt_data import executor_jobs as jobs

tasks = [Path(name) for name in sys.argv[2:]]
LocalExecutor(2).run(partial(jobs.setup_function, getattr(jobs, sys.argv[1])), tasks, names=sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("task", "number"),
    [
        ("wait_long", signal.SIGINT),
        ("wait_long", signal.SIGTERM),
        ("wait_long", signal.SIGKILL),
        pytest.param(
            "hold_interpreter",
            signal.SIGKILL,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs parent death signals"),
        ),
    ],
)
def test_workers_end_with_their_parent(tmp_path: Path, repository: Path, task: str, number: signal.Signals) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    # A session of its own, to which an interrupt can be sent as a terminal would: to all processes at once.
    parent = subprocess.Popen(
        [sys.executable, "-c", WAITER, task, *map(str, paths)],
        cwd=repository,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores interrupts in what it starts in the background, these tests perhaps.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [psutil.Process(int(path.read_text())) for path in paths]
    start = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)
    else:
        parent.send_signal(number)
    _, errors = parent.communicate(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert alive == []
    assert time.monotonic() - start < 15
    assert parent.returncode == -number
    # The parent's own traceback, and none of a worker's.
    assert errors.count("Traceback") == (1 if number == signal.SIGINT else 0)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="workers must be at least 1, not 0"):
        LocalExecutor(0)
    with pytest.raises(InputError, match="attempts must be at least 1, not 0"):
        LocalExecutor(attempts=0)
    with pytest.raises(ValueError, match="1 tasks have 2 names"):
        LocalExecutor().run(partial(jobs.setup_function, jobs.worker_variable), [0], names=["a", "b"])


@given(
    st.lists(st.lists(st.sampled_from("rfi"), min_size=4, max_size=4), max_size=8),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_schedule_neither_loses_nor_doubles(scripts: list[list[str]], attempts: int, generator: random.Random) -> None:
    ended: list[int] = []
    sums = [0, 0, 0]

    def count(*amounts: int) -> None:
        for place, amount in enumerate(amounts):
            sums[place] += amount

    schedule: Schedule[int] = Schedule(
        [str(n) for n in range(len(scripts))],
        attempts=attempts,
        pause=1.0,
        on_progress=count,
        on_result=lambda index, result: ended.append(index),
    )
    now, running = 0.0, list[int]()
    tried: Counter[int] = Counter()
    first_starts: list[int] = []
    while schedule.unfinished:
        if generator.random() < 0.5 and (index := schedule.take(now)) is not None:
            running.append(index)
            tried[index] += 1
            if tried[index] == 1:
                first_starts.append(index)
        elif running:
            index = running.pop(generator.randrange(len(running)))
            schedule.progress(index, (index + 1, 1, 1))
            letter = scripts[index][tried[index] - 1]
            if letter == "r":
                schedule.succeed(index, index)
            else:
                schedule.fail(index, "because", again=letter == "f", now=now)
        else:
            now += schedule.seconds_to_next(now) or 0
    assert first_starts == sorted(first_starts)
    good = [n for n, script in enumerate(scripts) if "r" in "".join(script[:attempts]).split("i")[0]]
    assert sorted(ended) == good
    assert [failure.index for failure in schedule.failures] == [n for n in range(len(scripts)) if n not in good]
    assert sums == [sum(good) + len(good), len(good), len(good)]
