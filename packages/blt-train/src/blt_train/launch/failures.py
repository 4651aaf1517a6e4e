"""Why a job failed: what each launcher saw, and the one failure that most likely caused the others.

When one process dies, its peers lose their connections or wait in vain, and fail as well. A user is told of the first
one alone, in one sentence, the same on every node.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum


class Cause(IntEnum):
    """What a failure is like; the smaller, the more likely it came before the others."""

    BAD_INPUT = 0
    """A process says what is wrong with its input: another start would find the same."""

    SYSTEM = 1
    """The system refused a process something: a full disk, a file server that is gone."""

    KILLED = 2
    """A process was killed by a signal."""

    NODE_LOST = 3
    """A node's launcher fell silent."""

    HANGING = 4
    """A process still runs, but its peers waited for it in vain."""

    ERROR = 5
    """A process failed with an error of another kind."""

    PEER_SILENT = 6
    """A process waited in vain for others: it is not at fault."""

    PEER_LOST = 7
    """A process lost its connection to another: it is not at fault."""


#: Causes that lie in another process.
PEER_CAUSES = frozenset({Cause.PEER_SILENT, Cause.PEER_LOST})
#: Causes that another start would meet again.
LASTING_CAUSES = frozenset({Cause.BAD_INPUT})

RUN_AGAIN = ", so the job was ended; run the same command again to go on from the latest checkpoint"
ALL_AGAIN = ", so the job was ended; launch all nodes again to go on from the latest checkpoint"
SEE_WHERE = "; set BLT_TRACEBACK=1 to see where"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One thing that went wrong."""

    cause: Cause
    """What it is like."""

    what: str
    """What happened, as a user is told it."""

    mend: str = ""
    """What to do where the job ends of it, with the mark that joins it on."""

    time: float = 0.0
    """When, in seconds since the epoch by the clock of its node."""

    @property
    def sentence(self) -> str:
        """What a user is told when the job ends, without an end stop."""
        return self.what + self.mend

    @property
    def is_lasting(self) -> bool:
        """Whether starting again is of no use."""
        return self.cause in LASTING_CAUSES


def culprit(failures: Sequence[Failure]) -> Failure:
    """Return the failure that most likely caused the others.

    Args:
        failures: at least one, of all nodes; every process that still runs may be among them as hanging, and counts as
            such only if others waited in vain and nothing else explains it.
    """
    others = {failure.cause for failure in failures} - {Cause.HANGING}
    is_hanging = Cause.PEER_SILENT in others and others <= PEER_CAUSES
    known = [failure for failure in failures if is_hanging or failure.cause is not Cause.HANGING] or failures
    return min(known, key=lambda failure: (failure.cause, failure.time, failure.what))


def failures_to_json(failures: Sequence[Failure]) -> str:
    """Return failures as a text that `failures_from_json` reads back."""
    return json.dumps([asdict(failure) for failure in failures])


def failures_from_json(text: str | bytes) -> tuple[Failure, ...]:
    """Return the failures that a text of `failures_to_json` holds."""
    return tuple(Failure(**{**item, "cause": Cause(item["cause"])}) for item in json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """What a failing process says of itself."""

    cause: Cause
    """What its error is like."""

    sentence: str
    """The error's message."""

    time: float
    """When, in seconds since the epoch."""

    @classmethod
    def read_file(cls, path: str) -> Reason | None:
        """Return what a process left in a file; None where it left none, or could not finish it.

        Args:
            path: of the file.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError):
            return None
        return cls.read(content) if isinstance(content, dict) else None

    @classmethod
    def read(cls, content: Mapping[str, object]) -> Reason | None:
        """Return what an error file of torchrun says; None where a process of another make wrote it.

        Args:
            content: the file's JSON.
        """
        message = content.get("message")
        extra = message.get("extraInfo") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not isinstance(extra, Mapping) or "cause" not in extra:
            return None
        return cls(
            cause=Cause[str(extra["cause"])], sentence=str(message["message"]), time=float(extra.get("time", 0.0))
        )


def process_failure(*, process: str, exit_code: int, reason: Reason | None, now: float) -> Failure:
    """Return the failure of a process that has ended.

    Args:
        process: its name in messages, such as `process 3 of 16 (on node-2)`.
        exit_code: its status; negative for a signal.
        reason: what it left, if anything.
        now: the time, where it left none.
    """
    time = reason.time if reason is not None else now
    if reason is not None and reason.cause in (Cause.BAD_INPUT, Cause.SYSTEM):
        return Failure(cause=reason.cause, what=reason.sentence, time=time)
    if reason is not None:
        return Failure(cause=reason.cause, what=f"{process} failed ({reason.sentence})", mend=SEE_WHERE, time=time)
    if exit_code == -signal.SIGABRT:
        # So ends a process that gives up a collective operation, in NCCL's watchdog, and whatever calls abort().
        what = f"{process} was aborted, most likely in an operation that other processes did not take part in"
        return Failure(cause=Cause.PEER_SILENT, what=what, mend=RUN_AGAIN, time=time)
    if exit_code < 0:
        hint = " (out of memory, perhaps)" if exit_code == -signal.SIGKILL else ""
        what = f"{process} was killed by {_signal_name(-exit_code)}{hint}"
        return Failure(cause=Cause.KILLED, what=what, mend=RUN_AGAIN, time=time)
    return Failure(cause=Cause.ERROR, what=f"{process} failed (exit status {exit_code})", mend=SEE_WHERE, time=time)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
