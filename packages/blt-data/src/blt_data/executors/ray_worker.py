"""The actor of `RayExecutor`.

It is sent to the cluster by value, so that it can say in words that this package, or the version of it, is missing
there; it must import nothing of ours before that is known, and nothing of Ray.
"""

from __future__ import annotations

import gc
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any


class RayWorker:
    """Does tasks on a node of the cluster, one at a time, while another thread answers how far it is."""

    def __init__(self) -> None:
        self._function: Any = None
        self._current: tuple[int, Any] | None = None

    def greet(
        self, packages: Sequence[str], token: str | None, content: bytes, environment: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return what the driver checks before it sends anything else.

        Args:
            packages: names of distributions whose versions are asked for.
            token: absolute path of a file that the driver has just written, or None.
            content: what is in it.
            environment: variables to set here, unless they are set.
        """
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        return {
            "node": socket.gethostname(),
            "process": os.getpid(),
            "python": ".".join(platform.python_version_tuple()[:2]),
            "packages": {name: self._version(name) for name in packages},
            "sees": token is None or self._sees(token, content),
        }

    def set_up(self, setup: bytes) -> Any:
        """Return None, or the `Problem` that keeps this worker from working.

        Args:
            setup: the pickled `Setup`.
        """
        from blt_data.executors.attempt import Problem
        from blt_data.executors.channel import deserialise

        # What an earlier run has left, perhaps a model.
        self._function = self._current = None
        gc.collect()
        try:
            self._function = deserialise(setup)()
        except BaseException as error:  # whatever it is, the driver tells it
            return Problem.of(error)
        return None

    def run(self, number: int, task: bytes) -> Any:
        """Return the `Outcome` of an attempt, whose amounts are all that was done in it.

        Args:
            number: of the attempt, to tell it from others.
            task: the pickled task.
        """
        from blt_data.executors.attempt import Meter, attempt
        from blt_data.executors.channel import deserialise

        meter = Meter()
        self._current = (number, meter)
        return attempt(self._function, partial(deserialise, task), meter)

    def look(self, seconds: float) -> tuple[int, tuple[int, int, int], int] | None:
        """Return, after a while, which attempt is going on, how much it has done, and how often it has told so.

        Args:
            seconds: the while.
        """
        time.sleep(seconds)
        if self._current is None:
            return None
        number, meter = self._current
        amounts, calls = meter.look()
        return number, amounts, calls

    @staticmethod
    def _version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    @staticmethod
    def _sees(token: str, content: bytes) -> bool:
        # A network file system may show a new file a little later.
        for _ in range(10):
            try:
                with open(token, "rb") as file:
                    return file.read() == content
            except OSError:
                time.sleep(0.5)
        return False
