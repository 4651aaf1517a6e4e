"""A Ray cluster of two nodes on this machine, for tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import ray
from ray.cluster_utils import Cluster

#: As small as Ray takes it: results go through it, and they are small.
_OBJECT_STORE_BYTES = 78_643_200


class TwoNodes:
    """Two raylets that say to have four CPUs each, the first of them the head."""

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.shutdown()  # in case another test has left a connection
        self._folder = tempfile.mkdtemp(prefix="ray-")
        # The default and no argument, as Ray notes the cluster's address in its default folder, be that there or not.
        self._default_folder = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = self._folder
        self._others: list[subprocess.Popen[bytes]] = []
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_system_config": {
                    # Processes that no actor asked for would only take time.
                    "prestart_worker_first_driver": False,
                    "enable_worker_prestart": False,
                    # A raylet that is gone refuses connections at once; one that is slow has ten seconds as usual.
                    "health_check_period_ms": 500,
                },
            },
        )
        self.second: Any = None
        self.add_second()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        ray.shutdown()
        for process in self._others:
            kill_tree(process.pid)
        self.cluster.shutdown()  # type: ignore[no-untyped-call]
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._default_folder is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = self._default_folder

    def add_second(self) -> None:
        self.second = self.cluster.add_node(num_cpus=4, object_store_memory=_OBJECT_STORE_BYTES)

    def kill_second(self) -> None:
        """Kill the second node as a power cut would: its raylet first, so that nothing is told."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def add_by_command(self, prefix: Sequence[str], option: str) -> None:
        """Start another raylet through a command, and wait until it is part of the cluster."""
        command = [
            *prefix,
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            f"--address={self.address}",
            "--block",
        ]
        command += ["--num-cpus=1", option, f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        before = self._alive()
        log = Path(self._folder) / "added.log"
        with log.open("wb") as output:
            self._others.append(subprocess.Popen(command, stdout=output, stderr=output))
        deadline = time.monotonic() + 60
        while self._alive() <= before:
            if time.monotonic() > deadline or self._others[-1].poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.2)

    def remove_added(self) -> None:
        before = self._alive()
        kill_tree(self._others.pop().pid)
        deadline = time.monotonic() + 60
        while self._alive() >= before and time.monotonic() < deadline:
            time.sleep(0.2)

    def _alive(self) -> int:
        return sum(bool(node["Alive"]) for node in self.cluster.global_state.node_table())  # type: ignore[no-untyped-call]


def kill_tree(process: int) -> None:
    """Kill a process and all it has started."""
    try:
        top = psutil.Process(process)
    except psutil.NoSuchProcess:
        return
    for one in [*top.children(recursive=True), top]:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs([top], timeout=10)
