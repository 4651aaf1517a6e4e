"""Connecting to a Ray cluster quietly, and its errors as sentences."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

from blt_data.errors import InputError

log = logging.getLogger(__name__)

#: Seconds to wait for the cluster's port; Ray itself would wait for minutes and then end the process.
_CONNECT_SECONDS: Final = 10.0

#: Characters of Ray's own words in a sentence.
_LONGEST: Final = 300


def import_ray() -> Any:
    """Return the module `ray`, told not to talk.

    Raises:
        InputError: it is not installed.
    """
    # Read once, when Ray is imported. Whatever raylets say about our workers' deaths, our own sentences say as well.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".|^$")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would have every worker of a driver under `uv run` call `uv run` itself, in a copy of the working directory:
    # an environment that is made anew, without what the driver's has, if it can be made at all.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        raise InputError("Ray is not installed; pip install 'blt-data[ray]'") from error


def connect(ray: Any, address: str, *, name: str, runtime_env: Mapping[str, Any] | None) -> bool:
    """Connect this process to a cluster, unless it is connected already.

    Args:
        ray: the module.
        address: `auto` (the cluster of this machine, or `RAY_ADDRESS`), `local` (a new one on this machine, for this
            process), `host:port`, or `ray://host:port`.
        name: the job's name.
        runtime_env: Ray's runtime environment of the job.

    Returns:
        Whether it was not connected before.

    Raises:
        InputError: there is no cluster, or it runs another version of Python or Ray.
    """
    if ray.is_initialized():
        if runtime_env is not None:
            raise InputError("this process is connected to Ray already; give the runtime environment to ray.init")
        return False
    reached = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    if match := re.fullmatch(r"(?:ray://)?\[?(?P<host>[^\[\]]+)\]?:(?P<port>\d+)", reached):
        _check_port(reached, match["host"], int(match["port"]))
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    if not address.startswith("ray://"):
        # Ray's client takes none; its server starts the job.
        options["job_config"] = ray.job_config.JobConfig(metadata={"job_name": name})
    try:
        ray.init(
            address=address,
            namespace=name.replace(" ", "-"),
            runtime_env=None if runtime_env is None else dict(runtime_env),
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **options,
        )
    except (Exception, SystemExit) as error:  # Ray raises whatever its parts do, and exits when a cluster is silent
        log.debug("ray.init failed", exc_info=True)
        raise InputError(_why_not_connected(address, error)) from error
    return True


def _check_port(address: str, host: str, port: int) -> None:
    try:
        with socket.create_connection((host, port), _CONNECT_SECONDS):
            pass
    except OSError as error:
        raise InputError(
            f"nothing answers at the Ray address {address} ({error.strerror or error}); "
            "check the address and that the cluster runs (ray status)"
        ) from error


def _why_not_connected(address: str, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "ray[client]" in text:
        return "an address with ray:// needs Ray's client; pip install 'ray[client]'"
    if "ersion mismatch" in text:
        return f"the Ray cluster at {address} runs other versions than this command; make them equal: {text}"
    if isinstance(error, ConnectionError) and address == "auto":
        return "no Ray cluster runs on this machine; start one (ray start --head), or give --ray-address host:port"
    # Ray says why in its log alone.
    token = (
        "; if it asks for a token, as clusters do since Ray 2.60, set RAY_AUTH_MODE=token and, unless it is in "
        "~/.ray/auth_token, RAY_AUTH_TOKEN"
        if isinstance(error, ConnectionError) and "RAY_AUTH_MODE" not in os.environ
        else ""
    )
    return f"cannot connect to the Ray cluster at {address} ({text or type(error).__name__}){token}"


def resources_in_words(ray: Any) -> str:
    """Return what a cluster has, such as `4 CPUs and 0 GPUs on 2 nodes`."""
    with suppress(Exception):  # it serves a message alone
        resources = ray.cluster_resources()
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs on {nodes} nodes"
    return "unknown resources"


def death_in_words(error: BaseException, node: str) -> str:
    """Return how a worker was lost.

    Args:
        error: what Ray raised for a call of the actor.
        node: the name of its node, if it is known.
    """
    text = " ".join(str(error).split())
    where = f" on node {node}" if node else ""
    kind = type(error).__name__
    if kind == "RuntimeEnvSetupError":
        return f"Ray could not make the runtime environment: {text}"
    if kind == "ActorUnavailableError":
        return f"the connection to its worker{where} was lost"
    if kind == "OutOfMemoryError" or "memory monitor" in text:
        return f"Ray killed its worker{where} for lack of memory: give each worker more memory, or use fewer"
    if "node has died" in text or "node died" in text or kind == "NodeDiedError":
        return f"its node{f' {node}' if node else ''} died"
    if "worker process has died" in text:
        return f"its worker process{where} died, perhaps for lack of memory"
    return f"its worker{where} failed: {text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}"
