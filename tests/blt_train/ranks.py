"""Several training processes as forks of one that has torch loaded already: a job on gloo in half a second.

Each has the environment that torchrun gives a process. Only for programs that run nothing on several threads before.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable

import torch._dynamo  # noqa: F401  # sharding loads it on first use; loaded here, every fork has it


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


def run_ranks(count: int, body: Callable[[], None]) -> list[int]:
    """Run `body` in so many processes of one job; return their exit codes, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in start_ranks(count, body)]


def start_ranks(count: int, body: Callable[[], None]) -> list[int]:
    """Start a job; return the process ids, by rank."""
    environment = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port(),
    }
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update({key: str(value) for key, value in environment.items()})
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
            os._exit(_status(body))
        children.append(child)
    return children


def _status(body: Callable[[], None]) -> int:
    try:
        body()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
