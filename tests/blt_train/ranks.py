"""Several training processes as forks of one that has torch loaded already: a job on gloo in half a second.

Each has the environment that torchrun gives a process. Only for programs that run nothing on several threads before.
"""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

import torch._dynamo  # noqa: F401  # sharding loads it on first use; loaded here, every fork has it

#: Below the ports that Linux (from 32,768) and others (from 49,152) give to connections that ask for none: such a
#: connection of any program would take a port between its choice here and its use.
PORTS = range(20_000, 32_000)
#: Seconds that the other ranks of a job have to end once one of them has failed.
GRACE = 90.0


def free_port() -> int:
    """A port of this machine that nobody listens on and that no connection is given by chance."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    for port in random.SystemRandom().sample(PORTS, 100):
        try:
            with socket.create_server(("", port), family=family, dualstack_ipv6=both):
                return port
        except OSError:
            continue
    raise RuntimeError(f"none of 100 ports from {PORTS.start} to {PORTS.stop} is free")


def run_ranks(count: int, body: Callable[[], None]) -> list[int]:
    """Run `body` in so many processes of one job; return their exit codes, negative for a signal.

    Ranks that still run some time after another has failed wait for it in vain, and are killed.
    """
    children = start_ranks(count, body)
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < count:
        collect(children, codes)
        if any(codes.values()):
            deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            kill_others(children, codes)
            deadline = math.inf
        time.sleep(0.01)
    return [codes[child] for child in children]


def collect(children: list[int], codes: dict[int, int]) -> None:
    """Note which processes have ended meanwhile."""
    for child in set(children) - set(codes):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            codes[child] = os.waitstatus_to_exitcode(status)


def kill_others(children: list[int], codes: dict[int, int]) -> None:
    """Kill the processes that have not ended."""
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)


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
