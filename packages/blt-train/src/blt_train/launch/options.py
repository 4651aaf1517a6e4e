"""What a user can say of a job of several processes; without torch, so that a mistake is told at once."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from blt_train.errors import ConfigError

#: The job's name among those that meet at one endpoint.
DEFAULT_JOB_ID = "blt-train"
#: Port of an endpoint that names a host alone; torchrun's.
DEFAULT_PORT = 29400
#: Seconds that ranks have for their checkpoint after a signal.
DEFAULT_GRACE_SECONDS = 300.0
#: Seconds that the launchers of all nodes have to find each other.
DEFAULT_JOIN_SECONDS = 600
#: Ports are 16 bits.
_MAX_PORT = 65535


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where the launchers of all nodes meet: the first node, which serves what they share."""

    host: str
    """Name or address of the first node, as the others reach it."""

    port: int
    """TCP port there; 0 lets the system choose one, on a single node."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Return the endpoint that a text names.

        Args:
            text: `HOST:PORT`, or `HOST` for torchrun's port.

        Raises:
            ConfigError: it names none.
        """
        host, separator, port = text.rpartition(":") if ":" in text else (text, "", "")
        if not host or host.startswith("-") or (separator and not (port.isascii() and port.isdigit())):
            raise ConfigError(f"--rdzv-endpoint {text!r} must be HOST:PORT of the first node, such as node-1:29400")
        number = int(port) if separator else DEFAULT_PORT
        if not 0 < number <= _MAX_PORT:
            raise ConfigError(f"--rdzv-endpoint {text!r}: the port must be between 1 and {_MAX_PORT}")
        return cls(host=host, port=number)

    def check_host(self) -> None:
        """Check that the host's name is known on this machine, as far as its name server answers.

        Raises:
            ConfigError: there is no such host.
        """
        try:
            socket.getaddrinfo(self.host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            # Whatever else is wrong may pass, and the launchers try for a while.
            if isinstance(error, UnicodeError) or error.errno == socket.EAI_NONAME:
                raise ConfigError(
                    f"--rdzv-endpoint {self}: {self.host} is not known here: give the first node's name or address as "
                    "this machine knows it"
                ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchOptions:
    """How many processes a job has, where they run, and what becomes of it when one of them fails."""

    processes: int = 1
    """Processes on this node, one per device."""

    nodes: int = 1
    """Nodes of the job; a launcher is started on each."""

    node_rank: int = 0
    """Number of this node, from 0; its processes have the ranks after those of the nodes before it."""

    endpoint: Endpoint | None = None
    """Where the launchers meet; None on a single node."""

    job_id: str = DEFAULT_JOB_ID
    """Name of the job; launchers of another job at the same endpoint are kept apart."""

    max_restarts: int = 0
    """How often all processes are started again, from the latest checkpoint, after one has failed."""

    grace_seconds: float = DEFAULT_GRACE_SECONDS
    """Seconds that the processes have for a checkpoint after a signal, before they are killed."""

    join_seconds: int = DEFAULT_JOIN_SECONDS
    """Seconds to wait for the launchers of the other nodes."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of range, or a job of several nodes lacks what it needs.
        """
        for name, value, least in (
            ("nproc-per-node", self.processes, 1),
            ("nnodes", self.nodes, 1),
            ("max-restarts", self.max_restarts, 0),
            ("join-seconds", self.join_seconds, 1),
        ):
            if value < least:
                raise ConfigError(f"--{name} must be at least {least}, not {value}")
        if not self.grace_seconds >= 0:
            raise ConfigError(f"--grace-seconds must be at least 0, not {self.grace_seconds:g}")
        if not self.job_id:
            raise ConfigError("--rdzv-id must not be empty; give the job any name, the same on every node")
        if not 0 <= self.node_rank < self.nodes:
            last = self.nodes - 1
            raise ConfigError(
                f"--node-rank {self.node_rank} does not fit --nnodes {self.nodes}: nodes are numbered from 0 to {last}"
            )
        if self.nodes > 1 and self.endpoint is None:
            raise ConfigError(
                f"--nnodes {self.nodes} needs --rdzv-endpoint HOST:PORT, the first node's name and a free port there, "
                "the same on every node"
            )

    @property
    def world_size(self) -> int:
        """Processes of the job, if every node has as many as this one."""
        return self.nodes * self.processes


def torchrun_command(arguments: Sequence[str], options: LaunchOptions) -> str:
    """Return the shell command that starts this node's processes without `blt-train launch`.

    Args:
        arguments: of `blt-train`.
        options: of the job.
    """
    if options.endpoint is None:
        place = ["--standalone"]
    else:
        place = [
            f"--nnodes={options.nodes}",
            f"--node-rank={options.node_rank}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={options.endpoint}",
            f"--rdzv-id={options.job_id}",
        ]
    restarts = [f"--max-restarts={options.max_restarts}"] if options.max_restarts else []
    words = ["torchrun", *place, f"--nproc-per-node={options.processes}", *restarts, "-m", "blt_train", *arguments]
    return shlex.join(words)
