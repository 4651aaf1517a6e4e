"""What a training process does for its launcher: it ends with it, and leaves it the reason of a failure."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from blt_data.console import sentence_of
from blt_train.launch.failures import Cause

#: Where torchrun's agent wants a failing process to write its reason.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
#: Set for processes whose launcher tells their errors: its process id.
LAUNCHER = "BLT_TRAIN_LAUNCHER"
#: Set with it: how often the job's processes have been started before.
STARTS = "BLT_TRAIN_STARTS"

#: `prctl`'s option that asks for a signal when the parent ends.
_PR_SET_PDEATHSIG = 1
#: Seconds between looks at the parent, where the system does not tell.
_PARENT_POLL_SECONDS = 1.0
#: What the messages of gloo's errors hold: the source file they come from.
_GLOO = "/gloo/"
#: What messages hold that tell of a wait in vain, in small letters.
_TIMEOUTS = ("timed out", "timeout")
#: Status of a process that SIGINT ended, as shells count it.
EXIT_INTERRUPTED = 130


def is_rank() -> bool:
    """Return whether this process is one of a job that torchrun (or `blt-train launch`) started."""
    return "RANK" in os.environ


def is_restarted() -> bool:
    """Return whether this process takes the place of one that failed in the same job."""
    return any(os.environ.get(name, "0") != "0" for name in (STARTS, "TORCHELASTIC_RESTART_COUNT"))


def run_as_rank(body: Callable[[], None]) -> None:
    """Run one process's part of a job, leaving its reason for the launcher if it fails.

    Args:
        body: the part.

    Raises:
        SystemExit: it failed, and the launcher tells why.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None:
        end_with(int(launcher))
    try:
        body()
    except KeyboardInterrupt:
        if launcher is None:
            raise
        _leave(EXIT_INTERRUPTED)
    except SystemExit as stop:
        if launcher is None or not isinstance(stop.code, int):
            raise
        _leave(stop.code)
    except Exception as error:
        is_written = _write_reason(error)
        if launcher is None or not is_written or os.environ.get("BLT_TRACEBACK"):
            raise
        _leave(1)


def _leave(status: int) -> None:
    """End at once: the usual end of a process waits for threads that may wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, however that ends.

    Processes without a launcher would go on training, or wait for their peers, with nobody to stop them.

    Args:
        parent: process id of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="launcher-watch", daemon=True).start()
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


def cause_of(error: Exception) -> Cause:
    """Return what an error of a training process is like.

    Args:
        error: that ended its training.
    """
    if isinstance(error, ValueError):
        return Cause.BAD_INPUT
    if isinstance(error, (OSError, MemoryError)):
        return Cause.SYSTEM
    # Recognised by name, so that an error before torch is loaded need not load it.
    is_torchs = any(base.__module__ == "torch.distributed" for base in type(error).__mro__)
    if is_torchs or (isinstance(error, RuntimeError) and _GLOO in str(error)):
        return Cause.PEER_SILENT if any(word in str(error).lower() for word in _TIMEOUTS) else Cause.PEER_LOST
    return Cause.ERROR


def _write_reason(error: Exception) -> bool:
    """Write an exception into the file that torchrun's agent reads, in its format; return whether that went well."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    cause = cause_of(error)
    text = sentence_of(error)
    if cause not in (Cause.BAD_INPUT, Cause.SYSTEM):
        text = f"{type(error).__name__}: {text}"
    extra = {
        "timestamp": str(int(time.time())),  # torchrun reads whole seconds
        "time": time.time(),
        "py_callstack": "".join(traceback.format_exception(error)),
        "cause": cause.name,
    }
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)
    except OSError:  # a full disk, most likely the very error
        return False
    return True
