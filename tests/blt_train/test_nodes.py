"""Two launchers, as on two nodes: failures on one end the job on both, told once; signals reach all processes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

from tests.blt_train.jobs import Job, processes_of

from blt_train import read_metrics
from blt_train.errors import EXIT_REQUEUE, EXIT_SIGTERM


def arguments(workplace: Path, *overrides: str) -> list[str]:
    """Of a training that takes longer than any test."""
    return ["debug-blt", f"data.train={workplace / 'patched'}", "schedule.total_steps=100000", *overrides]


def test_restarts_after_failures_until_a_node_is_gone(workplace: Path) -> None:
    frequent = ("checkpoint.every=2", "parallel.timeout_seconds=15", "--max-restarts", "2")
    job = Job(workplace / "run", arguments(workplace, *frequent))
    job.start()
    job.start()
    first = job.wait_for_steps(3)
    os.kill(first[1], signal.SIGKILL)
    second = job.wait_for_others(first)
    # It went on from a checkpoint: no step was repeated in the metrics, none is missing.
    steps = [item.step for item in read_metrics(job.run)[0]]
    assert steps == list(range(1, len(steps) + 1))
    # A process that hangs, at node 0 this time.
    os.kill(second[0], signal.SIGSTOP)
    third = job.wait_for_others(second)
    assert not set(third.values()) & {*first.values(), *second.values()}
    # A node that is gone, with its launcher and its process.
    begun = time.monotonic()
    job.launchers[1].kill()
    # With no restart left, the other one ends, too.
    (status, told), (killed, others) = job.end()
    assert time.monotonic() - begun < 60
    assert (status, killed) == (1, -signal.SIGKILL)
    assert len(told) == 3, told
    assert told[0].startswith("restart 1 of 2 from the latest checkpoint, since process 1 of 2 (on ")
    assert told[0].endswith("was killed by SIGKILL (out of memory, perhaps)")
    assert told[1].startswith("restart 2 of 2 from the latest checkpoint, since process 0 of 2 (on ")
    assert "hangs: the others waited for it as long as parallel.timeout_seconds says" in told[1]
    assert told[2].startswith("error: node 1 of 2 (")
    assert others == told[:2]
    assert not processes_of(job.run)


def test_bad_input_on_one_node_is_told_on_both_and_never_tried_again(workplace: Path) -> None:
    # The nodes see different files under the same name.
    for name in ("good", "bad"):
        shutil.copytree((workplace / "patched").resolve(), workplace / name / "data")
    shard = sorted((workplace / "bad" / "data").glob("*.arrow"))[-1]
    whole = shard.read_bytes()
    # Damage that the first process alone looks for, in the content.
    middle = whole.index(b"looked at")
    shard.write_bytes(whole[:middle] + b"LOOKED AT" + whole[middle + 9 :])
    job = Job(workplace / "run", ["debug-blt", "data.train=data", "--max-restarts", "5"])
    job.start(directory=workplace / "bad")
    job.start(directory=workplace / "good")
    ends = job.end()
    assert [status for status, _ in ends] == [1, 1]
    assert ends[0][1] == ends[1][1]
    assert len(ends[0][1]) == 1, ends
    assert ends[0][1][0].startswith(f"error: data/{shard.name}: ")

    # And what a launcher finds before it starts anything.
    shard.write_bytes(whole[:-1000])
    job = Job(workplace / "run", ["debug-blt", "data.train=data", "--max-restarts", "5"])
    job.start(directory=workplace / "good")
    job.start(directory=workplace / "bad")
    (status, told), (other_status, other_told) = job.end()
    assert (status, other_status) == (1, 1)
    assert len(told) == len(other_told) == 1, (told, other_told)
    assert told[0].startswith("error: another node cannot take part: ")
    assert told[0].endswith(other_told[0].removeprefix("error: "))
    assert not processes_of(job.run)


def test_a_signal_to_one_launcher_stops_all_and_a_full_disk_on_one_node_too(workplace: Path) -> None:
    rare = arguments(workplace, "checkpoint.every=100000", "--max-restarts", "2")
    job = Job(workplace / "run", rare)
    job.start()
    job.start()
    job.wait_for_steps(2)
    job.launchers[1].send_signal(signal.SIGUSR1)
    ends = job.end()
    step = len(read_metrics(job.run)[0])
    assert ends == [
        (EXIT_REQUEUE, [f"stopped by SIGUSR1 after step {step}; run the same command again to go on"]),
        (EXIT_REQUEUE, []),
    ]
    assert (job.run / "latest").resolve().name == f"step-{step:08d}"

    # On from there; node 1 may not write files as large as its part of a checkpoint.
    job = Job(job.run, arguments(workplace, "checkpoint.every=100000"))
    job.start()
    job.start(prefix=["sh", "-c", 'ulimit -f 100; exec "$@"', "sh"])
    job.wait_for_steps(step + 2)
    job.launchers[0].send_signal(signal.SIGTERM)
    (status, told), (other_status, other_told) = job.end()
    assert (status, other_status) == (1, 1)
    assert "the checkpoint of step" in told[-1]
    assert "File too large" in told[-1]
    assert (told[-1:], sum("error" in line for line in told)) == (other_told, 1)
    assert (job.run / "latest").resolve().name == f"step-{step:08d}"
    assert not processes_of(job.run)


def test_a_signal_before_any_process_trains(workplace: Path) -> None:
    job = Job(workplace / "run", arguments(workplace))
    job.start()
    line = ""
    assert job.launchers[0].stderr is not None
    while not line.startswith("the same by hand"):
        line = job.launchers[0].stderr.readline()
        assert line, "it ended"
    time.sleep(0.5)
    job.launchers[0].send_signal(signal.SIGTERM)
    told = "stopped by SIGTERM before the first step; run the same command again to go on"
    assert job.end() == [(EXIT_SIGTERM, [told])]
    assert not (workplace / "run").exists()
