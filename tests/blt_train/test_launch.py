"""What launchers decide: options, which failure is told, what nodes tell each other, and what a batch script says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.blt_train.samples import blt_config, command
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch has them there, undeclared

from blt_train.errors import EXIT_REQUEUE, EXIT_SIGTERM, ConfigError, TrainingError
from blt_train.launch import board as board_module
from blt_train.launch.board import Board
from blt_train.launch.failures import (
    Cause,
    Failure,
    Reason,
    culprit,
    failures_from_json,
    failures_to_json,
    process_failure,
)
from blt_train.launch.job import _leave_stopped, count_devices
from blt_train.launch.options import DEFAULT_PORT, Endpoint, LaunchOptions, torchrun_command
from blt_train.launch.rank import EXIT_INTERRUPTED, cause_of


def test_an_endpoint_is_a_host_and_a_port() -> None:
    assert Endpoint.parse("node-1:1234") == Endpoint(host="node-1", port=1234)
    assert str(Endpoint.parse("node-1")) == f"node-1:{DEFAULT_PORT}"
    for text in ("", ":1234", "node-1:", "node-1:x", "node-1:0", "node-1:65536", "node-1:-1", "--nnodes"):
        with pytest.raises(ConfigError, match="--rdzv-endpoint"):
            Endpoint.parse(text)


def test_a_host_that_nobody_knows_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    Endpoint(host="127.0.0.1", port=1).check_host()
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match=r"--rdzv-endpoint no\.such\.host:1: no\.such\.host is not known here: give"):
        Endpoint(host="no.such.host", port=1).check_host()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"processes": 0}, "--nproc-per-node must be at least 1, not 0"),
        ({"nodes": 0}, "--nnodes must be at least 1"),
        ({"max_restarts": -1}, "--max-restarts must be at least 0"),
        ({"grace_seconds": float("nan")}, "--grace-seconds must be at least 0"),
        ({"job_id": ""}, "--rdzv-id must not be empty"),
        ({"nodes": 2}, "--nnodes 2 needs --rdzv-endpoint"),
        ({"nodes": 2, "node_rank": 2}, "--node-rank 2 does not fit --nnodes 2"),
    ],
)
def test_options_that_make_no_job_are_refused(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LaunchOptions(**values)  # type: ignore[arg-type]  # wrong on purpose


def test_the_command_for_torchrun() -> None:
    words = ["launch", "my config.yaml", "seed=3"]
    alone = torchrun_command(words, LaunchOptions(processes=2))
    assert alone == "torchrun --standalone --nproc-per-node=2 -m blt_train launch 'my config.yaml' seed=3"
    options = LaunchOptions(
        processes=8, nodes=4, node_rank=3, endpoint=Endpoint(host="a", port=7), job_id="x", max_restarts=2
    )
    assert torchrun_command(words[:1], options) == (
        "torchrun --nnodes=4 --node-rank=3 --rdzv-backend=c10d --rdzv-endpoint=a:7 --rdzv-id=x --nproc-per-node=8 "
        "--max-restarts=2 -m blt_train launch"
    )
    assert options.world_size == 32


def test_as_many_processes_as_gpus(workplace: Path) -> None:
    gpus = torch.cuda.device_count()
    assert count_devices(blt_config(workplace, "run")) == max(1, gpus)
    assert count_devices(blt_config(workplace, "run", "device=cpu")) == 1


def test_a_stop_is_told_once_and_no_step_denied() -> None:
    """By the processes, or by the launcher with what it knows of them."""
    told: list[str] = []
    for status, untold in (
        (EXIT_REQUEUE, None),
        (EXIT_SIGTERM, "before the first step"),
        (EXIT_REQUEUE, "before all processes had agreed on a step"),
    ):
        with pytest.raises(SystemExit) as ended:
            _leave_stopped(status, told.append, untold)
        assert ended.value.code == status
    assert told == [
        "stopped by SIGTERM before the first step; run the same command again to go on",
        "stopped by SIGUSR1 before all processes had agreed on a step; run the same command again to go on",
    ]
    with pytest.raises(KeyboardInterrupt):
        _leave_stopped(EXIT_INTERRUPTED, told.append, None)


def reason(cause: Cause, sentence: str = "said", at: float = 5.0) -> Reason:
    return Reason(cause=cause, sentence=sentence, time=at)


def test_the_culprit_is_who_failed_first() -> None:
    def failure(exit_code: int, why: Reason | None, now: float = 9.0) -> Failure:
        return process_failure(process="process 1 of 2", exit_code=exit_code, reason=why, now=now)

    lost = failure(1, reason(Cause.PEER_LOST, "DistError: closed"))
    killed = failure(-signal.SIGKILL, None)
    wrong = failure(1, reason(Cause.BAD_INPUT, "a.arrow: is damaged", at=11))
    full = failure(1, reason(Cause.SYSTEM, "a: No space left on device", at=12))
    aborted = failure(-signal.SIGABRT, None, now=1.0)
    other = failure(1, reason(Cause.ERROR, "TypeError: no", at=8))
    unknown = failure(3, None, now=7.0)
    assert culprit([lost, killed]) is killed
    assert culprit([lost, killed, wrong, full]) is wrong
    assert culprit([lost, full, killed]) is full
    assert culprit([aborted, lost, other]) is other
    assert culprit([other, unknown]) is unknown  # the earlier of two of a kind
    # A process that runs on hangs only if others waited for it, and for nothing else.
    hanging = Failure(cause=Cause.HANGING, what="process 0 of 2 hangs")
    assert culprit([aborted, lost, hanging]) is hanging
    assert culprit([lost, hanging]) is lost
    assert culprit([aborted, hanging, other]) is other
    assert culprit([aborted, hanging, killed]) is killed
    assert [item.is_lasting for item in (wrong, full, killed, lost)] == [True, False, False, False]
    assert wrong.sentence == "a.arrow: is damaged"
    assert killed.sentence.startswith("process 1 of 2 was killed by SIGKILL (out of memory, perhaps)")
    assert unknown.sentence.startswith("process 1 of 2 failed (exit status 3)")
    assert failure(-signal.SIGSEGV, None).sentence.startswith("process 1 of 2 was killed by SIGSEGV, so")
    assert failures_from_json(failures_to_json([lost, wrong])) == (lost, wrong)


def test_what_errors_of_a_process_are_like() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1"
    waited = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv"
    assert cause_of(TrainingError("x")) is Cause.BAD_INPUT
    assert cause_of(OSError(28, "No space left on device")) is Cause.SYSTEM
    assert cause_of(MemoryError()) is Cause.SYSTEM
    assert cause_of(RuntimeError(gloo)) is Cause.PEER_LOST
    assert cause_of(RuntimeError(waited)) is Cause.PEER_SILENT
    assert cause_of(dist.DistBackendError("closed")) is Cause.PEER_LOST
    assert cause_of(dist.DistStoreError("wait timeout after 300000ms")) is Cause.PEER_SILENT
    assert cause_of(RuntimeError("shapes differ")) is Cause.ERROR


@pytest.fixture
def store() -> TCPStore:
    """What nodes meet at; each test has one of its own."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def boards(store: TCPStore, count: int) -> list[Board]:
    """The boards of several nodes, joined, with one, two, three... processes."""
    # A connection each, as nodes have: one that waits keeps others from using it.
    clients = [TCPStore("localhost", store.port, is_master=False, timeout=timedelta(seconds=60)) for _ in range(count)]
    made = [Board(PrefixStore("job", client), node, count) for node, client in enumerate(clients)]
    places: list[tuple[int, int] | None] = [None] * count

    def join(node: int) -> None:
        places[node] = made[node].join(node + 1)

    # In any order: each waits for all others.
    threads = [threading.Thread(target=join, args=(node,)) for node in reversed(range(count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = count * (count + 1) // 2
    assert places == [(node * (node + 1) // 2, total) for node in range(count)]
    return made


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another connection has written."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nodes_agree_on_one_failure(store: TCPStore) -> None:
    first, second, third = boards(store, 3)
    killed = Failure(cause=Cause.KILLED, what="killed", time=3.0)
    lost = Failure(cause=Cause.PEER_LOST, what="lost", time=1.0)
    assert not first.look()
    second.report([killed])
    wait_until(first.look)
    first.report([lost])
    third.report([])
    wait_until(lambda: first.reports() == {0: (lost,), 1: (killed,), 2: ()})
    assert third.verdict() is None
    # Whoever chooses first chooses for all.
    assert first.agree([lost, killed]) == killed
    assert third.agree([lost]) == killed
    assert second.verdict() == killed


def test_two_launchers_with_one_number_are_told(store: TCPStore) -> None:
    board = Board(store, 1, 2)
    store.set("blt/node/0", "1 elsewhere 5")
    board.join(1)
    with pytest.raises(ConfigError, match="--node-rank 1 was given to two launchers"):
        Board(store, 1, 2).join(1)


def test_a_silent_node_is_lost_unless_it_has_left(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(board_module, "BEAT_SECONDS", 0.0)
    first, second = boards(store, 2)
    second.beat()
    wait_until(lambda: first.lost_nodes() == [1])
    second.beat()
    wait_until(lambda: first.lost_nodes() == [])
    second.leave(is_host=False)
    time.sleep(0.3)
    wait_until(lambda: first.lost_nodes() == [])
    # The host need not wait for it.
    first.leave(is_host=True, timeout=1000)


def test_a_signal_reaches_all_nodes(store: TCPStore) -> None:
    first, second = boards(store, 2)
    assert second.requested_stop() is None
    first.request_stop(signal.SIGUSR1)
    wait_until(lambda: second.requested_stop() == signal.SIGUSR1)


ORPHAN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import os, sys, time
from blt_train.launch.rank import end_with
end_with(os.getppid())
print("ready", flush=True)
time.sleep(600)
'''], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_its_launcher() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    os.kill(child, 0)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    """Whether a process runs; one that nobody waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--nnodes", "2"], "--nnodes 2 needs --node-rank: 0 on the node of --rdzv-endpoint"),
        (["--nnodes", "2", "--node-rank", "0"], "--nnodes 2 needs --rdzv-endpoint"),
        (["--nproc-per-node", "2", "sede=3"], "did you mean seed?"),
    ],
)
def test_a_wrong_launch_is_told_before_a_process_starts(workplace: Path, options: list[str], told: str) -> None:
    arguments = ("launch", "debug-blt", f"data.train={workplace / 'patched'}", *options)
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=workplace, check=False)
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (workplace / "runs").exists()


def test_the_reason_is_left_as_torchrun_reads_it(tmp_path: Path) -> None:
    script = (
        "from blt_train.launch.rank import run_as_rank\n"
        "def body():\n    raise OSError(28, 'No space left on device', 'run/x')\n"
        "run_as_rank(body)\n"
    )
    path = tmp_path / "error.json"
    environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(path), "BLT_TRAIN_LAUNCHER": str(os.getpid())}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    content = json.loads(path.read_text())
    left = Reason.read(content)
    assert left is not None
    assert left.cause is Cause.SYSTEM
    assert left.sentence == "run/x: No space left on device; free some space and run the same command again"
    assert int(content["message"]["extraInfo"]["timestamp"]) == int(left.time)
