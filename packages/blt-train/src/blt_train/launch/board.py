"""What the launchers of a job's nodes tell each other, in the store that they meet at.

torchrun's agents share a store for finding each other and nothing else: when a process dies on one node, the agents
of the others learn of it only when their own processes fail, which on GPUs takes as long as a collective operation may
last. Here each launcher shows that it lives, raises an alarm when something fails on its node, and all agree on one
failure to tell. The board belongs to one start of the processes; a restart has a new one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blt_train.errors import ConfigError, TrainingError
from blt_train.launch.failures import Failure, culprit, failures_from_json, failures_to_json

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch has it there, undeclared

#: Seconds between signs of life.
BEAT_SECONDS = 2.0
#: Seconds without a sign of life after which a node counts as lost.
SILENCE_SECONDS = 15.0
#: Seconds to wait for the other nodes' reports after an alarm.
REPORT_SECONDS = 3.0
#: Seconds between looks at the board.
POLL_SECONDS = 0.5

_ALARM, _VERDICT, _STOP = "alarm", "verdict", "stop"


@dataclass(slots=True)
class _Pulse:
    """Another node's signs of life, by this machine's clock: those of several machines need not agree."""

    count: int = -1
    since: float = field(default_factory=time.monotonic)


class Board:
    """One node's view of what all nodes share."""

    def __init__(self, store: Store, node: int, nodes: int) -> None:
        """Take a place.

        Args:
            store: of one start of the processes; nothing else writes keys that begin with `blt/`.
            node: this node's number.
            nodes: how many there are.
        """
        self._store, self._node, self._nodes = store, node, nodes
        self._pulses = {other: _Pulse() for other in range(nodes) if other != node}
        self._beaten = 0.0
        self._looked = 0.0
        self.hosts: dict[int, str] = {}

    def join(self, processes: int) -> tuple[int, int]:
        """Say how many processes this node has and learn it of the others.

        Args:
            processes: of this node.

        Returns:
            The first rank of this node, and the number of processes of all nodes.

        Raises:
            ConfigError: two launchers have the same number, so one number is missing.
        """
        host = socket.gethostname()
        mine = f"{processes} {host} {time.time_ns()}"
        place = self._key("node", self._node)
        if self._store.compare_set(place, "", mine).decode() != mine:
            other = self._store.get(place).decode().split()[1]
            raise ConfigError(
                f"--node-rank {self._node} was given to two launchers, on {other} and on {host}: number the nodes from "
                f"0 to {self._nodes - 1}"
            )
        counts = []
        for node in range(self._nodes):
            words = self._store.get(self._key("node", node)).decode().split()
            counts.append(int(words[0]))
            self.hosts[node] = words[1]
        return sum(counts[: self._node]), sum(counts)

    def publish(self, name: str, value: str) -> None:
        """Tell all nodes one value, once.

        Args:
            name: of the value.
            value: any text.
        """
        self._store.set(self._key(name), value)

    def wait_for(self, name: str) -> str:
        """Return a value that a node publishes, waiting for it."""
        return self._store.get(self._key(name)).decode()

    def beat(self) -> None:
        """Show that this node lives, when it is time to."""
        now = time.monotonic()
        if self._nodes > 1 and now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self._store.add(self._key("beat", self._node), 1)

    def look(self) -> bool:
        """Return whether something is wrong on another node; looks at the store now and then."""
        now = time.monotonic()
        if self._nodes == 1 or now - self._looked < POLL_SECONDS:
            return False
        self._looked = now
        return self._store.check([self._key(_ALARM)]) or bool(self.lost_nodes())

    def lost_nodes(self) -> list[int]:
        """Return the nodes that have been silent for too long, and have not said that they are done."""
        now = time.monotonic()
        lost = []
        for node, pulse in self._pulses.items():
            count = self._store.add(self._key("beat", node), 0)
            if count != pulse.count:
                pulse.count, pulse.since = count, now
            elif now - pulse.since > SILENCE_SECONDS and not self._has("left", node):
                lost.append(node)
        return lost

    def request_stop(self, signum: int) -> None:
        """Pass a signal on to all nodes."""
        if self._nodes > 1:
            self._store.set(self._key(_STOP), str(int(signum)))

    def requested_stop(self) -> int | None:
        """Return the signal that some node passed on, if any."""
        if self._nodes == 1 or not self._store.check([self._key(_STOP)]):
            return None
        return int(self._store.get(self._key(_STOP)))

    def report(self, failures: Sequence[Failure]) -> None:
        """Tell what failed on this node and raise the alarm.

        Args:
            failures: none, if only others raised the alarm.
        """
        self._store.set(self._key("report", self._node), failures_to_json(failures))
        self._store.set(self._key(_ALARM), "raised")

    def reports(self) -> dict[int, tuple[Failure, ...]]:
        """Return what the nodes have reported so far."""
        return {
            node: failures_from_json(self._store.get(self._key("report", node)))
            for node in range(self._nodes)
            if self._has("report", node)
        }

    def agree(self, failures: Sequence[Failure]) -> Failure:
        """Return the one failure that all nodes tell: the choice of the node that chooses first.

        Args:
            failures: all that this node knows, at least one.
        """
        mine = failures_to_json([culprit(failures)])
        chosen = self._store.compare_set(self._key(_VERDICT), "", mine)
        return failures_from_json(chosen)[0]

    def verdict(self) -> Failure | None:
        """Return what the nodes agreed on, if they have."""
        if not self._store.check([self._key(_VERDICT)]):
            return None
        return failures_from_json(self._store.get(self._key(_VERDICT)))[0]

    def finish(self) -> None:
        """Say that this node's processes have ended as they should."""
        self._store.set(self._key("done", self._node), "yes")

    def all_finished(self) -> bool:
        """Return whether the processes of all nodes have ended as they should."""
        return all(self._has("done", node) for node in range(self._nodes))

    def leave(self, *, is_host: bool, timeout: float = SILENCE_SECONDS) -> None:
        """Say that this node has read all it needs; the node that serves the store waits for the others' word.

        Args:
            is_host: whether the store ends with this process.
            timeout: seconds to wait at most.
        """
        self._store.set(self._key("left", self._node), "yes")
        deadline = time.monotonic() + timeout
        while is_host and time.monotonic() < deadline:
            staying = {node for node in range(self._nodes) if not self._has("left", node)}
            if staying <= set(self.lost_nodes()):
                return
            time.sleep(POLL_SECONDS / 5)

    def _has(self, name: str, node: int) -> bool:
        return bool(self._store.check([self._key(name, node)]))

    def _key(self, name: str, node: int | None = None) -> str:
        return f"blt/{name}" if node is None else f"blt/{name}/{node}"


class Door:
    """Where launchers wait for each other before the first start, and hear which of them cannot come."""

    def __init__(self, store: Store, job_id: str, node: int, nodes: int) -> None:
        """Take a place.

        Args:
            store: that all launchers at an endpoint share.
            job_id: of this job among them.
            node: this node's number.
            nodes: how many there are.
        """
        self._store, self._job_id, self._node, self._nodes = store, job_id, node, nodes

    def refuse(self, sentence: str) -> None:
        """Say that this node cannot take part.

        Args:
            sentence: why.
        """
        self._store.set(self._key("refused"), f"{socket.gethostname()}: {sentence}")

    def wait(self, seconds: float) -> None:
        """Wait until the launchers of all nodes are here.

        Args:
            seconds: at most.

        Raises:
            ConfigError: one cannot come, or some have not come in time.
        """
        self._store.set(self._key("here", self._node), "yes")
        deadline = time.monotonic() + seconds
        while missing := [node for node in range(self._nodes) if not self._store.check([self._key("here", node)])]:
            if self._store.check([self._key("refused")]):
                raise ConfigError(f"another node cannot take part: {self._store.get(self._key('refused')).decode()}")
            if time.monotonic() > deadline:
                absent = ", ".join(map(str, missing))
                raise ConfigError(
                    f"no launcher came for node(s) {absent} of {self._nodes} within {seconds:g} seconds: start "
                    "`blt-train launch` on every node, with the same --rdzv-endpoint and --rdzv-id"
                )
            time.sleep(POLL_SECONDS)

    def _key(self, name: str, node: int | None = None) -> str:
        place = "" if node is None else f"/{node}"
        return f"blt-door/{self._job_id}/{name}{place}"


def store_lost(endpoint: object) -> TrainingError:
    """Return the error of a node whose connection to the first node is gone.

    Args:
        endpoint: where the launchers met.
    """
    return TrainingError(
        f"the launcher of the first node, at {endpoint}, no longer answers (it was killed, or the machine or the "
        "network is gone), so this node's processes were ended; launch all nodes again to go on from the latest "
        "checkpoint"
    )
