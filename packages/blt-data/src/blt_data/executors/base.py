"""What an executor is: it applies one function to many tasks, somewhere, and loses none of them.

The rules that hold for every executor, so that a job may rely on them whatever it runs on:

- `setup` is called once in each worker, before its first task, and returns the function that is applied to tasks.
- Tasks are started in their order, one at a time in each worker; they may end in any order.
- `InputError` fails a task at once. Any other exception, and the death of the worker or its machine, is tried again
  with a pause, up to a number of attempts. The other tasks go on and finish.
- Every task ends in exactly one call of `on_result` or in exactly one `TaskFailure`.
- A task may be run more than once (its worker may die after the work and before its result is known), so tasks must be
  idempotent. Where the network of a cluster is cut, an attempt that counts as dead may even go on beside the next one:
  what a task writes must get its name by an atomic rename from a file that no other attempt writes to.
- Workers end with the process that started them, however that ends.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, TypeAlias, TypeVar

from blt_data.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

#: Source bytes, documents and content bytes. What each of them counts is the job's affair; executors only add them.
Amounts: TypeAlias = tuple[int, int, int]

#: Takes source bytes, documents and content bytes since its last call. Negative ones take back what a failed attempt
#: had reported. A task may call it from any thread and as often as it likes: workers send sums a few times a second.
Report: TypeAlias = Callable[[int, int, int], None]

#: Does one task, telling now and then how far it is; what it returns must be picklable and small.
TaskFunction: TypeAlias = Callable[[T, Report], R]

#: Prepares a worker (loads a model, say) and returns what it applies to tasks. It must be picklable: a function of a
#: module, or a `functools.partial` of one.
Setup: TypeAlias = Callable[[], TaskFunction[T, R]]

#: How often a task is tried before it counts as failed.
DEFAULT_ATTEMPTS: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFailure:
    """A task that was given up."""

    index: int
    """Index among the tasks of the run."""
    name: str
    """The task's name, as given to `run`."""
    message: str
    """What was wrong at the last attempt, in one sentence."""
    attempts: int
    """How often it was tried."""

    def __str__(self) -> str:
        tried = "" if self.attempts == 1 else f" (tried {self.attempts} times)"
        return f"{self.name}: {self.message}{tried}"


class Executor(Protocol):
    """Runs tasks. It is used in a `with` block; one executor may run several lists of tasks, one after another."""

    @property
    def workers(self) -> int:
        """Return how many tasks run at once, at most."""

    @property
    def on_one_machine(self) -> bool:
        """Return whether all workers share this machine's memory."""

    def __enter__(self) -> Self:
        """Return the executor; nothing is started before it is needed."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every worker and let go of the cluster."""

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
        """Run every task, and return those that were given up, in their order.

        Args:
            setup: see `Setup`.
            tasks: n picklable tasks.
            names: n names to tell tasks by in messages.
            on_progress: called in this process with what the workers report, summed over all of them.
            on_result: called in this process, once for each task that succeeded, with its index and its result.
            shared_directory: an existing directory that every worker must see under the same path, as an absolute one;
                executors that leave this machine check that it does.

        Raises:
            InputError: no worker can be started or set up, the tasks cannot be sent to workers, or a worker does not
                see the shared directory. The sentence says what to do.
        """


def describe(error: BaseException) -> str:
    """Return one sentence on an exception that a task raised, without its traceback.

    Args:
        error: the exception.
    """
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, MemoryError):
        return f"there is too little memory{f' ({text})' if text else ''}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        mend = "; free some space and run the same command again" if error.errno in _NO_SPACE else ""
        return f"{where}{error.strerror}{mend}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_names(tasks: Sequence[object], names: Sequence[str]) -> None:
    """Check that every task has a name.

    Raises:
        ValueError: there are more or fewer names than tasks.
    """
    if len(tasks) != len(names):
        raise ValueError(f"{len(tasks)} tasks have {len(names)} names")
