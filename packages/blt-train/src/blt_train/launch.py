"""Starting a training job: in this process, or one process per device through torchrun's machinery.

Whatever a user can get wrong is checked before processes are started, as far as that is quick. If a process fails, the
others are ended by torchrun's agent and the launcher tells one sentence: that of the process at fault, not those of
its peers, which only lost a connection.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from blt_train.config import TrainConfig
from blt_train.errors import EXIT_SIGTERM, ConfigError, TrainingError
from blt_train.inputs import check_launch
from blt_train.runtime import choose_device

#: Where torchrun's agent wants a failing process to write its reason.
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
#: Set for processes whose launcher tells their errors.
_QUIET = "BLT_TRAIN_LAUNCHED"


def is_rank() -> bool:
    """Return whether this process is one of a job that torchrun (or `launch_processes`) started."""
    return "RANK" in os.environ


def torchrun_command(arguments: Sequence[str], processes: int) -> str:
    """Return the shell command that does what `launch_processes` does.

    Args:
        arguments: of `blt-train`.
        processes: how many.
    """
    return shlex.join(["torchrun", "--standalone", f"--nproc-per-node={processes}", "-m", "blt_train", *arguments])


def check_processes(config: TrainConfig, processes: int) -> None:
    """Check a config for a number of processes on this machine, before any is started.

    Args:
        config: of the run.
        processes: how many.

    Raises:
        ConfigError: the batch does not divide among them, or there are too few GPUs, or anything `check_launch` finds.
    """
    if processes < 1:
        raise ConfigError(f"--nproc-per-node must be at least 1, not {processes}")
    check_launch(config, processes)
    choose_device(config.device, processes - 1)


def launch_processes(arguments: Sequence[str], processes: int) -> None:
    """Run `blt-train` with these arguments in several processes of one job and wait for it.

    Args:
        arguments: of `blt-train`, such as ["launch", "config.yaml"].
        processes: how many.

    Raises:
        TrainingError: a process failed; the message is its own, or says which one died of what.
        SystemExit: SIGTERM or another signal ended the job (status 128 + its number).
    """
    # The agent would tell failures at length; they are told here, in one sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[_QUIET] = "1"
    job = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(job, sys.executable)("-m", "blt_train", *arguments)
    except ChildFailedError as error:
        failure = culprit(error.failures)
        if failure.exitcode == EXIT_SIGTERM:
            raise SystemExit(EXIT_SIGTERM) from error
        raise TrainingError(_sentence(failure, processes)) from error
    except SignalException as error:
        raise SystemExit(128 + int(error.sigval)) from error
    finally:
        del os.environ[_QUIET]


def run_as_rank(body: Callable[[], None]) -> None:
    """Run one process's part of a job, leaving its reason for the launcher if it fails.

    Args:
        body: the part.

    Raises:
        SystemExit: it failed, and the launcher tells why.
    """
    try:
        body()
    except Exception as error:
        _write_reason(error)
        if _QUIET in os.environ and not os.environ.get("BLT_TRACEBACK"):
            # The exit must not wait for peers that wait for this process.
            sys.stderr.flush()
            os._exit(1)
        raise


def _write_reason(error: Exception) -> None:
    """Write an exception into the file that torchrun's agent reads, in its format."""
    path = os.environ.get(_ERROR_FILE)
    if path is None:
        return
    is_user_error = isinstance(error, (ValueError, OSError))
    text = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    extra = {
        "timestamp": str(int(time.time())),
        "py_callstack": "".join(traceback.format_exception(error)),
        "is_user_error": is_user_error,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": " ".join(text.split()), "extraInfo": extra}}, file)


def culprit(failures: Mapping[int, ProcessFailure]) -> ProcessFailure:
    """Return the failure that most likely caused the others.

    An error that a user can mend comes first, then a process killed by a signal, then any other, by time.

    Args:
        failures: by rank, at least one.
    """

    def order(failure: ProcessFailure) -> tuple[int, int]:
        was_killed = failure.exitcode < 0
        return (0 if _extra(failure).get("is_user_error") else 1 if was_killed else 2, failure.timestamp)

    return min(failures.values(), key=order)


def _extra(failure: ProcessFailure) -> dict[str, Any]:
    message = failure.error_file_data.get("message")
    return dict(message.get("extraInfo", {})) if isinstance(message, dict) else {}


def _sentence(failure: ProcessFailure, processes: int) -> str:
    """Return what a user is told of a failure."""
    message = failure.error_file_data.get("message")
    text = str(message["message"]) if isinstance(message, dict) else ""
    if _extra(failure).get("is_user_error"):
        return text
    rank = f"process {failure.local_rank} of {processes}"
    if failure.exitcode < 0:
        return (
            f"{rank} was killed by {failure.signal_name()} (out of memory, perhaps), so the job was ended; run the "
            "same command again to go on from the latest checkpoint"
        )
    return f"{rank} failed ({text or f'exit status {failure.exitcode}'}); set BLT_TRACEBACK=1 to see where"
