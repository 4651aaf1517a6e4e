"""Jobs of real launchers and real training processes, on several nodes that are all this machine."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.blt_train.ranks import free_port
from tests.blt_train.samples import command

from blt_train import read_metrics

#: Seconds within which whatever a test waits for must have happened.
PATIENCE = 240.0


def processes_of(run: Path) -> dict[int, int]:
    """Rank to process id of the training processes of a run."""
    found = {}
    for directory in Path("/proc").iterdir():
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
            environment = (directory / "environ").read_bytes().split(b"\0")
        except (NotADirectoryError, FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        ranks = [item for item in environment if item.startswith(b"RANK=")]
        if f"run={run}".encode() in words and ranks:
            found[int(ranks[0].removeprefix(b"RANK="))] = int(directory.name)
    return found


class Job:
    """A launcher per node, each with one process, that train one run."""

    def __init__(self, run: Path, arguments: Sequence[str], *, nodes: int = 2) -> None:
        """Prepare.

        Args:
            run: directory of the run.
            arguments: of `blt-train launch`, without the run and the nodes.
            nodes: how many.
        """
        self.run, self._arguments, self._nodes = run, arguments, nodes
        self._endpoint = f"localhost:{free_port()}"
        self.launchers: list[subprocess.Popen[str]] = []

    def start(self, *, prefix: Sequence[str] = (), directory: Path | None = None) -> None:
        """Start the next node's launcher.

        Args:
            prefix: words before the command, such as a shell that sets limits.
            directory: where it runs.
        """
        node = ["--node-rank", str(len(self.launchers)), "--nnodes", str(self._nodes)]
        words = command("launch", *self._arguments, f"run={self.run}", *node, "--rdzv-endpoint", self._endpoint)
        launcher = subprocess.Popen(
            [*prefix, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory
        )
        self.launchers.append(launcher)

    def wait_for_steps(self, count: int) -> dict[int, int]:
        """Wait until the run has so many steps and all processes are there; return them by rank."""
        deadline = time.monotonic() + PATIENCE
        metrics = self.run / "metrics.jsonl"
        while (
            not metrics.exists() or len(read_metrics(self.run)[0]) < count or len(processes_of(self.run)) < self._nodes
        ):
            assert time.monotonic() < deadline
            for launcher in self.launchers:
                assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.05)
        return processes_of(self.run)

    def wait_for_others(self, before: dict[int, int]) -> dict[int, int]:
        """Wait until other processes than those of before train, beyond the step at which they were."""
        deadline = time.monotonic() + PATIENCE
        while set(processes_of(self.run).values()) & set(before.values()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # The metrics were cut back to the checkpoint that the others began with.
        begun = self._steps()
        return self.wait_for_steps(begun + 2)

    def _steps(self) -> int:
        return len(read_metrics(self.run)[0]) if (self.run / "metrics.jsonl").exists() else 0

    def end(self) -> list[tuple[int, list[str]]]:
        """Wait for all launchers; return the status of each and what it told, without progress."""
        ends = []
        for launcher in self.launchers:
            _, told = launcher.communicate(timeout=PATIENCE)
            lines = [line for line in told.splitlines() if not line.startswith(("the same by hand: ", "training "))]
            ends.append((launcher.returncode, lines))
        return ends
