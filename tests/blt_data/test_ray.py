"""Tasks on a real Ray cluster of two nodes: the same results, whatever dies."""

from __future__ import annotations

import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from blt_data import InputError
from blt_data.executors import LocalExecutor, TaskFailure
from blt_data.executors.ray import RayExecutor
from blt_data.executors.ray_pool import ActorNeeds, Greeting
from blt_data.executors.ray_worker import RayWorker
from blt_data.ingest import Listener, PrepareConfig, PrepareStart, TasksFailedError, prepare

from . import executor_jobs as jobs
from .corpora import files_of, json_lines, write_parquet
from .executor_jobs import Task, attempts_of
from .ray_cluster import TwoNodes


@pytest.fixture(scope="module")
def two_nodes(repository: Path) -> Iterator[TwoNodes]:
    # Ray gives the driver's path of imports to its workers.
    with pytest.MonkeyPatch.context() as patch, TwoNodes() as nodes:
        patch.syspath_prepend(str(repository))
        yield nodes


@pytest.fixture(scope="module")
def executor(two_nodes: TwoNodes) -> Iterator[RayExecutor]:
    """One connection for most tests; its actors are kept between tests. Six need both nodes, of four CPUs each."""
    with RayExecutor(two_nodes.address, 6, name="blt-data test", place_timeout=60, pause=0.01) as executor:
        yield executor


def run_tasks(
    executor: RayExecutor | LocalExecutor, tasks: list[Task], folder: Path
) -> tuple[tuple[TaskFailure, ...], list[jobs.Result], list[int]]:
    """Run tasks; return failures, results in order of arrival and the sums of progress."""
    results: list[jobs.Result] = []
    sums = [0, 0, 0]

    def count(*amounts: int) -> None:
        for place, amount in enumerate(amounts):
            sums[place] += amount

    failures = executor.run(
        partial(jobs.setup, folder),
        tasks,
        names=[f"task {task.number}" for task in tasks],
        on_progress=count,
        on_result=lambda index, result: results.append(result),
        shared_directory=folder,
    )
    return failures, results, sums


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_same_outcomes_as_in_local_processes(executor: RayExecutor, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    scripts = ["k", *("".join(generator.choices("rrrreqi", k=generator.randint(1, 3))) for _ in range(14)), "kr"]
    outcomes = []
    executors: tuple[RayExecutor | LocalExecutor, ...] = (executor, LocalExecutor(2, pause=0.01))
    for number, one in enumerate(executors):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        tasks = [Task(number, script, folder) for number, script in enumerate(scripts)]
        failures, results, sums = run_tasks(one, tasks, folder)
        tried = [len(attempts_of(folder, number)) for number in range(len(scripts))]
        failed = [(failure.index, failure.name, failure.attempts) for failure in failures]
        assert {result.setups for result in results} == {1}
        assert len({result.process for result in results}) > 1
        outcomes.append((failed, sorted(result.number for result in results), sums, tried))
        # The one that kills its worker each time is reported, and the others are finished.
        assert failures[0].index == 0
        assert "killed" in failures[0].message or "died, perhaps for lack of memory" in failures[0].message
    assert outcomes[0] == outcomes[1], f"seed {seed}"
    assert not list((tmp_path / "run-0").glob(".blt-ray-token*"))


def test_a_worker_process_killed_half_way(executor: RayExecutor, tmp_path: Path) -> None:
    tasks = [Task(number, "r", tmp_path, seconds=1.5) for number in range(8)]
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(lambda: attempts_of(tmp_path, 2))
        killed.append(attempts_of(tmp_path, 2)[0])
        psutil.Process(killed[0]).kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    failures, results, sums = run_tasks(executor, tasks, tmp_path)
    killer.join()
    assert failures == ()
    assert Counter(result.number for result in results) == Counter(range(8))
    assert sums == [sum(range(8)) + 8000, 8, 10 * sum(range(8))]
    assert attempts_of(tmp_path, 2)[0] == killed[0]
    assert next(result.process for result in results if result.number == 2) != killed[0]
    assert [len(attempts_of(tmp_path, number)) for number in range(8)] == [1, 1, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("needs", [{"num_cpus": 64}, {"num_gpus": 1}])
def test_no_room_is_told_in_time(two_nodes: TwoNodes, tmp_path: Path, needs: dict[str, float]) -> None:
    start = time.monotonic()
    with (
        RayExecutor(two_nodes.address, 2, name="blt-data test", place_timeout=2, **needs) as executor,  # type: ignore[arg-type]
        pytest.raises(
            InputError, match=r"had no place for a worker for 2 s: each needs .* the cluster has 8 CPUs and 0"
        ),
    ):
        run_tasks(executor, [Task(0, "r", tmp_path)], tmp_path)
    assert time.monotonic() - start < 15


def test_a_task_that_gives_no_sign_of_life_is_given_up(two_nodes: TwoNodes, tmp_path: Path) -> None:
    tasks = [Task(0, "r", tmp_path, seconds=600), Task(1, "r", tmp_path)]
    with RayExecutor(
        two_nodes.address, 2, name="blt-data test", hang_timeout=3, attempts=1, place_timeout=60
    ) as executor:
        failures, results, _ = run_tasks(executor, tasks, tmp_path)
    assert [result.number for result in results] == [1]
    assert len(failures) == 1
    assert "it gave no sign of life for 3 s on node" in failures[0].message
    wait_for(lambda: not psutil.pid_exists(attempts_of(tmp_path, 0)[0]))


def test_a_setup_that_fails_ends_the_run(executor: RayExecutor, tmp_path: Path) -> None:
    task = Task(0, "r", tmp_path)
    with pytest.raises(InputError, match="the model is no model; name another"):
        executor.run(partial(jobs.broken_setup, "input", tmp_path), [task, task], names=["a", "b"])
    with pytest.raises(InputError, match="no worker could be set up: RuntimeError: no such device"):
        executor.run(partial(jobs.broken_setup, "raise", tmp_path), [task, task], names=["a", "b"])


def test_a_node_that_does_not_see_the_directory(two_nodes: TwoNodes, tmp_path: Path) -> None:
    hide = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path} && exec "$@"', "sh"]
    if subprocess.run([*hide, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let a test hide a directory from a process")
    # Only this node has what the tasks need.
    two_nodes.add_by_command(hide, "--num-gpus=1")
    try:
        with (
            RayExecutor(two_nodes.address, 1, num_gpus=1, name="blt-data test", place_timeout=60) as there,
            pytest.raises(
                InputError, match=rf"node \S+ of the Ray cluster does not see {tmp_path}; write to a directory"
            ),
        ):
            run_tasks(there, [Task(0, "r", tmp_path)], tmp_path)
        assert not attempts_of(tmp_path, 0)
    finally:
        two_nodes.remove_added()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files, for some 30 tasks; random, so that no two documents are alike."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(random.randrange(2**32))
    for number in range(3):
        texts = ["".join(generator.choices("abc é\n日", k=generator.randint(0, 4000))) for _ in range(40)]
        write_parquet(folder / f"{number}.parquet", texts)
        (folder / f"{number}.jsonl").write_bytes(json_lines(texts[::-1]))
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process writes."""
    output = tmp_path_factory.mktemp("expected") / "out"
    prepare(prepare_config(corpus, output, workers=1))
    files = files_of(output)
    assert len(files) > 30
    return files


def prepare_config(corpus: Path, output: Path, workers: int | None = None) -> PrepareConfig:
    return PrepareConfig(source=str(corpus), output=output, shard_bytes=10_000, holdout_fraction=0.2, workers=workers)


def after_some_tasks(action: Callable[[], None]) -> Listener:
    """Do something once, when a few tasks of the first stage have ended."""
    ended = 0

    def count() -> None:
        nonlocal ended
        ended += 1
        if ended == 4:
            action()

    return Listener(on_task=count)


def kill_a_worker(title: str) -> None:
    """Kill one of the processes that this one, or its cluster, has started for tasks."""
    children = [child for child in psutil.Process().children(recursive=True) if title in " ".join(child.cmdline())]
    random.choice(children).kill()


@pytest.mark.parametrize(("workers", "kill"), [(2, False), (5, False), (3, True)])
def test_prepare_in_local_workers(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, workers: int, kill: bool
) -> None:
    kills: list[int] = []

    def kill_one() -> None:
        kill_a_worker("worker-")
        kills.append(1)

    listener = after_some_tasks(kill_one) if kill else None
    prepare(prepare_config(corpus, tmp_path / "out", workers), listener=listener)
    assert files_of(tmp_path / "out") == expected
    assert bool(kills) == kill


def test_prepare_reports_a_bad_file_and_finishes_the_rest(
    executor: RayExecutor, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    source, output = tmp_path / corpus.name, tmp_path / "out"
    source.mkdir()
    for path in corpus.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    good = (source / "1.jsonl").read_bytes()
    (source / "1.jsonl").write_bytes(b"[" + good[1:])
    with pytest.raises(TasksFailedError, match=r"1\.jsonl: line 1 is no JSON") as caught:
        prepare(prepare_config(source, output), executor=executor)
    assert [failure.attempts for failure in caught.value.failures] == [1]
    assert not (output / "train" / "manifest.json").exists()
    (source / "1.jsonl").write_bytes(good)
    starts: list[PrepareStart] = []
    prepare(prepare_config(source, output), executor=executor, listener=Listener(on_start=starts.append))
    assert files_of(output) == expected
    assert starts[0].tasks_resumed == starts[0].tasks - 1


def test_the_command_on_the_cluster(
    two_nodes: TwoNodes, corpus: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "blt_data.cli", "prepare", "--source", str(corpus), "--shard-size", "10kB"]
    command += ["--holdout-fraction", "0.2", "--executor", "ray", "--ray-address", two_nodes.address]
    # A relative path, from a folder in which no worker is.
    command += ["--output", "out"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False, env=clean_environment()
        )

    refused = run("--ray-memory", "900TB", "--ray-timeout", "1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "error: the Ray cluster had no place for a worker for 1 s" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = run("--workers", "3")
    assert done.returncode == 0, done.stderr
    assert "raylet" not in done.stderr
    assert "Ray" not in done.stdout + done.stderr
    assert files_of(tmp_path / "out") == expected


def greeting(token: Path | None, version: str | None = None) -> Greeting:
    here = version or metadata.version("blt-data")
    return Greeting(
        packages={"blt-data": here}, token=None if token is None else str(token), content=b"word", environment={}
    )


def test_workers_are_checked_before_they_get_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.delenv("BLT_TEST_VARIABLE", raising=False)
    token = tmp_path / "token"
    worker = RayWorker()
    answer = worker.greet(["blt-data"], str(token), b"word", {"BLT_TEST_VARIABLE": "secret", "PATH": "other"})
    assert os.environ.pop("BLT_TEST_VARIABLE") == "secret"
    assert os.environ["PATH"] != "other"
    with pytest.raises(InputError, match=f"does not see {tmp_path}; write to a directory that all nodes mount"):
        greeting(token).check(answer)
    token.write_bytes(b"word")
    seen = worker.greet(["blt-data", "no-such-package"], str(token), b"word", {})
    greeting(token).check(seen)
    greeting(None).check(worker.greet(["blt-data"], None, b"", {}))
    with pytest.raises(InputError, match=r"has blt-data 0\S+, this command 99.9; install the same version on both"):
        greeting(token, "99.9").check(seen)
    with pytest.raises(InputError, match=r"has no blt-data; install blt-data==99.9 there, or give the runtime"):
        greeting(token, "99.9").check({**seen, "packages": {"blt-data": None}})
    with pytest.raises(InputError, match=rf"runs Python 2.7, this command {platform.python_version()[:4]}"):
        greeting(token).check({**seen, "python": "2.7"})


def test_actors_that_fit() -> None:
    cluster = {"CPU": 10.0, "GPU": 4.0, "memory": 64e9}
    assert ActorNeeds(num_cpus=1, num_gpus=0, memory=None).fitting(cluster) == 10
    assert ActorNeeds(num_cpus=2, num_gpus=1, memory=None).fitting(cluster) == 4
    assert ActorNeeds(num_cpus=0.5, num_gpus=0, memory=8_000_000_000).fitting(cluster) == 8
    assert ActorNeeds(num_cpus=1, num_gpus=8, memory=None).fitting(cluster) == 1


def test_as_many_workers_as_the_cluster_has_room_for(two_nodes: TwoNodes) -> None:
    with RayExecutor(two_nodes.address, name="blt-data test") as executor:
        assert executor.workers == 8
        assert not executor.on_one_machine


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "nothing answers at the Ray address 127.0.0.1:9 (Connection refused); check the address"),
        ("ray://no-such-host.invalid:1", "nothing answers at the Ray address ray://no-such-host.invalid:1 ("),
    ],
)
def test_addresses_that_lead_nowhere(address: str, message: str) -> None:
    code = (
        "import sys\nfrom blt_data.executors.ray import RayExecutor\n"
        "try:\n    RayExecutor(sys.argv[1], 1).run(list, [0], names=['a'])\n"
        "except ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(message)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="a Ray worker needs a share of a CPU or a GPU"):
        RayExecutor(num_cpus=0)
    with pytest.raises(InputError, match="workers must be at least 1, not 0"):
        RayExecutor(workers=0)


def test_without_ray_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from blt_data.executors.ray import RayExecutor\n"
        "try:\n    RayExecutor()\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("Ray is not installed; pip install 'blt-data[ray]'\n", "")


DRIVER = """
import os, signal, sys, time
from pathlib import Path
from blt_data.executors.ray import RayExecutor

class Square:
    def __init__(self, side):
        self.side = side

def area(square, report):
    if square.side == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(os.path.join(folder, f"pid-{square.side}"), "w") as file:
        file.write(str(os.getpid()))
    print("a task says something")
    time.sleep(seconds)
    return square.side ** 2

def setup():
    return area

address, folder, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
found = {}
with RayExecutor(address, 2, name="blt-data driver", place_timeout=60, pause=0.01) as executor:
    tasks = [Square(n) for n in range(4)]
    failures = executor.run(setup, tasks, names="abcd", on_result=found.__setitem__, shared_directory=Path(folder))
print([failure.index for failure in failures], sorted(found.items()))
"""


def driver(nodes: TwoNodes, folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a driver of its own, in a folder that is nobody else's."""
    (folder / "cwd").mkdir()
    command = [sys.executable, "-c", DRIVER, nodes.address, str(folder), str(seconds)]
    return subprocess.Popen(
        command,
        cwd=folder / "cwd",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        # A shell ignores interrupts in what it starts in the background, these tests perhaps.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def test_a_driver_prints_its_own_words_alone(two_nodes: TwoNodes, tmp_path: Path) -> None:
    process = driver(two_nodes, tmp_path, 0.0)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert output == "[3] [(0, 0), (1, 1), (2, 4)]\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_driver_killed_leaves_no_worker(two_nodes: TwoNodes, tmp_path: Path, number: signal.Signals) -> None:
    process = driver(two_nodes, tmp_path, 600.0)
    paths = [tmp_path / "pid-0", tmp_path / "pid-1"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in paths))
    workers = [psutil.Process(int(path.read_text())) for path in paths]
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


def test_a_node_killed_half_way(executor: RayExecutor, two_nodes: TwoNodes, tmp_path: Path) -> None:
    tasks = [Task(number, "r", tmp_path, seconds=1.5) for number in range(18)]

    def kill_node() -> None:
        # All six workers have something to do.
        wait_for(lambda: len({process for number in range(18) for process in attempts_of(tmp_path, number)}) == 6)
        two_nodes.kill_second()

    killer = threading.Thread(target=kill_node)
    killer.start()
    try:
        failures, results, sums = run_tasks(executor, tasks, tmp_path)
    finally:
        killer.join()
        two_nodes.add_second()
    assert failures == ()
    assert Counter(result.number for result in results) == Counter(range(18))
    assert sums == [sum(range(18)) + 18_000, 18, 10 * sum(range(18))]
    # Those that ran there ran again.
    assert sum(len(attempts_of(tmp_path, number)) for number in range(18)) > 18


# The last test, as it leaves one node.
@pytest.mark.parametrize("killed", ["nothing", "worker", "node"])
def test_prepare_on_the_cluster(
    two_nodes: TwoNodes, executor: RayExecutor, corpus: Path, expected: dict[str, bytes], tmp_path: Path, killed: str
) -> None:
    kills: list[str] = []

    def kill() -> None:
        if killed == "worker":
            kill_a_worker("ray::RayWorker")
        else:
            two_nodes.kill_second()
        kills.append(killed)

    listener = None if killed == "nothing" else after_some_tasks(kill)
    prepare(prepare_config(corpus, tmp_path / "out"), executor=executor, listener=listener)
    assert files_of(tmp_path / "out") == expected
    assert bool(kills) == (killed != "nothing")
