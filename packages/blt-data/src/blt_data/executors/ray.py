"""Tasks in actors on a Ray cluster."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from blt_data.errors import InputError
from blt_data.executors.base import DEFAULT_ATTEMPTS, R, Report, Setup, T, TaskFailure, check_names
from blt_data.executors.ray_cluster import connect, import_ray
from blt_data.executors.ray_pool import ActorNeeds, ActorPool, Greeting
from blt_data.executors.schedule import Schedule

log = logging.getLogger(__name__)

#: Variables of this process's environment that workers need to read the sources; they travel in memory alone.
_FORWARDED: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT")

_TOKEN_PREFIX: Final = ".blt-ray-token-"

#: Tokens that a killed driver left are removed when they are this old, in seconds.
_TOKEN_LIFE: Final = 86_400.0


class RayExecutor:
    """Runs tasks in actors, one task at a time in each.

    Actors are created as tasks need them and may stay pending, so that a cluster that grows by itself can grow; the
    run goes on with those that are there. A lost actor or node is replaced by a new actor. Actors that have nothing to
    do when a run ends are kept for the next one, until the executor is left; they end with this process at the latest.
    The tasks' paths must be absolute: actors have a working directory of their own.

    Args:
        address: `auto` (the cluster of this machine, or `RAY_ADDRESS`), `local` (a new one on this machine, for this
            process), `host:port`, or `ray://host:port`.
        workers: how many actors at most; None takes as many as the cluster has room for when the run starts.
        num_cpus: CPUs that each actor reserves.
        num_gpus: GPUs that each actor reserves.
        memory: bytes of memory that each actor reserves, or None.
        name: what the dashboard shows, as namespace, job and actor names.
        packages: distributions that workers must have in the version that they have here, if they are installed here.
        runtime_env: Ray's runtime environment of the job.
        place_timeout: seconds after which a run fails if no actor at all could be placed.
        hang_timeout: seconds after which a task that neither reports nor ends is ended and tried again.
        attempts: how often a task is tried.
        pause: seconds before a task is tried again; each further attempt waits twice as long.

    Raises:
        InputError: Ray is not installed, or a number is too small.
    """

    def __init__(
        self,
        address: str = "auto",
        workers: int | None = None,
        *,
        num_cpus: float = 1,
        num_gpus: float = 0,
        memory: int | None = None,
        name: str = "blt-data",
        packages: Sequence[str] = ("blt-data",),
        runtime_env: Mapping[str, Any] | None = None,
        place_timeout: float = 600.0,
        hang_timeout: float = 1800.0,
        attempts: int = DEFAULT_ATTEMPTS,
        pause: float = 1.0,
    ) -> None:
        for what, value in (("workers", 1 if workers is None else workers), ("attempts", attempts)):
            if value < 1:
                raise InputError(f"{what} must be at least 1, not {value}")
        if num_cpus < 0 or num_gpus < 0 or num_cpus + num_gpus == 0:
            raise InputError("a Ray worker needs a share of a CPU or a GPU, and less than none is not possible")
        self._ray = import_ray()
        self._address, self._wanted, self._name = address, workers, name
        self._needs = ActorNeeds(num_cpus=num_cpus, num_gpus=num_gpus, memory=memory)
        self._packages, self._runtime_env = tuple(packages), runtime_env
        self._place_timeout, self._hang_timeout = place_timeout, hang_timeout
        self._attempts, self._pause = attempts, pause
        self._connected_here = False
        self._kept: list[Any] = []

    @property
    def workers(self) -> int:
        """Return how many tasks run at once, at most; this may connect to the cluster.

        Raises:
            InputError: the cluster cannot be reached.
        """
        if self._wanted is None:
            self._connect()
            return self._needs.fitting(self._ray.cluster_resources())
        return self._wanted

    @property
    def on_one_machine(self) -> bool:
        """Return that workers do not share this machine's memory, as far as is known."""
        return False

    def __enter__(self) -> Self:
        """Return the executor."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all actors; disconnect, if it was this object that connected."""
        while self._kept:
            with suppress(Exception):  # it may be dead, or its node, or the cluster
                self._ray.kill(self._kept.pop(), no_restart=True)
        if self._connected_here:
            self._connected_here = False
            self._ray.shutdown()

    def run(
        self,
        setup: Setup[T, R],
        tasks: Sequence[T],
        *,
        names: Sequence[str],
        on_progress: Report | None = None,
        on_result: Callable[[int, R], None] | None = None,
        shared_directory: Path | None = None,
    ) -> tuple[TaskFailure, ...]:
        """Run every task; see `Executor.run`.

        Raises:
            InputError: the cluster cannot be reached, has no room within the timeout, or a node lacks this package, has
                another version of it, or does not see the shared directory.
        """
        check_names(tasks, names)
        if not tasks:
            return ()
        self._connect()
        schedule = Schedule(
            names, attempts=self._attempts, pause=self._pause, on_progress=on_progress, on_result=on_result
        )
        with _token(shared_directory) as (token, content):
            greeting = Greeting(
                packages=_installed(self._packages),
                token=token,
                content=content,
                environment={variable: os.environ[variable] for variable in _FORWARDED if variable in os.environ},
            )
            pool = ActorPool(
                self._ray,
                self._dumps(setup),
                size=self.workers,
                name=self._name,
                needs=self._needs,
                greeting=greeting,
                kept=self._kept,
                attempts=self._attempts,
                place_timeout=self._place_timeout,
                hang_timeout=self._hang_timeout,
            )
            with pool:
                pool.run(lambda index: self._dumps(tasks[index]), schedule)
        return schedule.failures

    def _connect(self) -> None:
        if connect(self._ray, self._address, name=self._name, runtime_env=self._runtime_env):
            self._connected_here = True

    @staticmethod
    def _dumps(value: Any) -> bytes:
        try:
            data: bytes = import_module("ray.cloudpickle").dumps(value)
        except Exception as error:  # objects may raise anything when they are pickled
            raise InputError(
                f"a task cannot be sent to the cluster ({' '.join(str(error).split())}); "
                "it must not hold open files, locks or connections"
            ) from error
        return data


def _installed(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed here; others are imported from a folder."""
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@contextmanager
def _token(directory: Path | None) -> Iterator[tuple[str | None, bytes]]:
    """Put a file in the shared directory, by which nodes show that they see it, and yield its path and content."""
    if directory is None:
        yield None, b""
        return
    _remove_old_tokens(directory)
    content = secrets.token_hex(16).encode()
    path = directory.absolute() / f"{_TOKEN_PREFIX}{secrets.token_hex(8)}"
    path.write_bytes(content)
    try:
        yield str(path), content
    finally:
        path.unlink(missing_ok=True)


def _remove_old_tokens(directory: Path) -> None:
    for path in directory.glob(f"{_TOKEN_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _TOKEN_LIFE:
                path.unlink()
