"""Tasks in this process, or in processes of this machine.

Workers are fresh interpreters rather than a `multiprocessing` pool: they inherit no locks and no open files, do not run
the main script again (which need not have a `__main__` guard), can be given an environment each, and their deaths are
seen as what they are. The light core of this package is imported in a quarter of a second.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from operator import getitem
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Generic, Self

from blt_data.errors import InputError
from blt_data.executors.attempt import Meter, Outcome, Problem, attempt
from blt_data.executors.base import DEFAULT_ATTEMPTS, R, Report, Setup, T, TaskFailure, check_names
from blt_data.executors.channel import Channel, serialise
from blt_data.executors.schedule import Schedule
from blt_data.executors.slots import Slots
from blt_data.executors.worker import STOP

log = logging.getLogger(__name__)

#: Environment of the worker with this number (from 0), in addition to this process's own.
WorkerEnvironment = Callable[[int], Mapping[str, str]]

#: Seconds that workers get to end by themselves when all is done.
_GRACE: Final = 10.0

#: Seconds between looks at whether workers live, on systems that cannot tell by themselves.
_LOOK: Final = 1.0

# The path of imports must be this process's before anything is imported.
_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[5]); "
    "from blt_data.executors.worker import main; main(*map(int, sys.argv[2:5]))"
)


class LocalExecutor:
    """Runs tasks on this machine.

    A worker process that dies is replaced. Workers inherit the working directory and standard error; their standard
    output goes to standard error, and their standard input is empty.

    Args:
        workers: how many tasks run at once. With 1, or for a single task, they run in this process, and the death of a
            task is the death of this process.
        attempts: how often a task is tried.
        pause: seconds before a task is tried again; each further attempt waits twice as long.
        worker_environment: environment variables for each worker, such as the GPU it may see. If it is given, tasks
            never run in this process.

    Raises:
        InputError: a number is too small.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        attempts: int = DEFAULT_ATTEMPTS,
        pause: float = 1.0,
        worker_environment: WorkerEnvironment | None = None,
    ) -> None:
        for name, value in (("workers", workers), ("attempts", attempts)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        self._workers, self._attempts, self._pause = workers, attempts, pause
        self._worker_environment = worker_environment

    @property
    def workers(self) -> int:
        """Return how many tasks run at once, at most."""
        return self._workers

    @property
    def on_one_machine(self) -> bool:
        """Return that all workers share this machine's memory."""
        return True

    def __enter__(self) -> Self:
        """Return the executor."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: workers live no longer than `run`."""

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
        """Run every task; see `Executor.run`."""
        check_names(tasks, names)
        schedule = Schedule(
            names, attempts=self._attempts, pause=self._pause, on_progress=on_progress, on_result=on_result
        )
        if not tasks:
            return ()
        if self._worker_environment is None and 1 in (self._workers, len(tasks)):
            _run_here(setup, tasks, schedule)
        else:
            with _Pool(setup, self._workers, self._attempts, self._worker_environment) as pool:
                pool.run(tasks, schedule)
        return schedule.failures


def _run_here(setup: Setup[T, R], tasks: Sequence[T], schedule: Schedule[R]) -> None:
    try:
        function = setup()
    except Exception as error:
        raise InputError(Problem.of(error).message) from error
    while schedule.unfinished:
        now = time.monotonic()
        index = schedule.take(now)
        if index is None:
            time.sleep(schedule.seconds_to_next(now) or 0)
            continue
        meter = Meter(partial(_progress, schedule, index), interval=0)
        outcome = attempt(function, partial(getitem, tasks, index), meter, catch=Exception)
        _settle(schedule, index, outcome)


def _progress(schedule: Schedule[R], index: int, *amounts: int) -> None:
    schedule.progress(index, (amounts[0], amounts[1], amounts[2]))


def _settle(schedule: Schedule[R], index: int, outcome: Outcome) -> None:
    """Tell the schedule how an attempt ended."""
    schedule.progress(index, outcome.amounts)
    if outcome.problem is None:
        schedule.succeed(index, outcome.result)
        return
    log.debug("task %d: %s", index, outcome.problem.trace)
    again = not outcome.problem.input_at_fault
    schedule.fail(index, outcome.problem.message, again=again, now=time.monotonic())


class _Worker:
    """A worker process, as seen from here.

    Args:
        number: its number, from 0; one that replaces another has the same.
        process: the process.
        channel: this end of the connection.
    """

    def __init__(self, number: int, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self.number, self.process, self.channel = number, process, channel
        self.set_up = False
        self.problem: Problem | None = None
        self.task: int | None = None
        # A death is seen by this even when a grandchild keeps the connection open.
        self.death: int | None = os.pidfd_open(process.pid) if hasattr(os, "pidfd_open") else None

    def forget(self) -> None:
        """Let go of what belongs to a process that has ended."""
        self.channel.close()
        if self.death is not None:
            os.close(self.death)

    def how_it_ended(self) -> str:
        """Return how the process ended, in words that follow its name."""
        code = self.process.wait()
        if code >= 0:
            return f"ended with status {code}"
        number = -code
        name = signal.Signals(number).name if number in signal.Signals.__members__.values() else ""
        memory = ", perhaps for lack of memory: try fewer workers" if number == signal.SIGKILL else ""
        return f"was killed by signal {number}{f' ({name})' if name else ''}{memory}"


class _Pool(Generic[T, R]):
    """The worker processes of one run.

    Args:
        setup: see `Setup`.
        size: the most workers.
        attempts: how often in a row a worker may end before its first task until it is given up.
        environment: see `LocalExecutor`.
    """

    def __init__(self, setup: Setup[T, R], size: int, attempts: int, environment: WorkerEnvironment | None) -> None:
        self._environment = environment
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}
        self._slots = Slots(size, attempts)
        self._setup: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        self._setup.write(serialise(setup, "the setup of the workers"))
        self._setup.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_workers(at_once=kind is not None)
        self._selector.close()
        self._setup.close()

    def run(self, tasks: Sequence[T], schedule: Schedule[R]) -> None:
        """Run until no task is unfinished."""
        while schedule.unfinished:
            now = time.monotonic()
            self._hand_out(tasks, schedule, now)
            seconds = schedule.seconds_to_next(now)
            if not hasattr(os, "pidfd_open"):
                seconds = min(_LOOK, _LOOK if seconds is None else seconds)
            for worker in self._wait(seconds):
                if not self._listen(worker, schedule):
                    self._bury(worker, schedule)

    def _hand_out(self, tasks: Sequence[T], schedule: Schedule[R], now: float) -> None:
        """Give tasks to idle workers, and start as many workers as there are more tasks."""
        idle = [worker for worker in self._workers.values() if worker.set_up and worker.task is None]
        for worker in sorted(idle, key=lambda worker: worker.number):
            if (index := schedule.take(now)) is None:
                return
            worker.task = index
            with suppress(OSError):  # it has died; `_listen` will see it
                worker.channel.send(serialise(tasks[index], "a task"))
        starting = sum(not worker.set_up for worker in self._workers.values())
        for number in self._slots.free(set(self._workers))[: max(0, schedule.startable(now) - starting)]:
            self._start_worker(number)

    def _wait(self, seconds: float | None) -> Iterator[_Worker]:
        """Yield the workers that have something to say or have died, each once."""
        seen = {key.data for key, _ in self._selector.select(seconds)}
        if not hasattr(os, "pidfd_open"):
            seen |= {number for number, worker in self._workers.items() if worker.process.poll() is not None}
        for number in sorted(seen):
            yield self._workers[number]

    def _listen(self, worker: _Worker, schedule: Schedule[R]) -> bool:
        """Act on what a worker has sent; return whether it lives on."""
        dead = worker.process.poll() is not None  # asked before reading, so that nothing it sent is missed
        try:
            for data in worker.channel.arrived():
                message = pickle.loads(data)
                if isinstance(message, tuple) and worker.task is not None:
                    schedule.progress(worker.task, message)
                elif isinstance(message, Outcome) and worker.task is not None:
                    index, worker.task = worker.task, None
                    self._slots.worked(worker.number)
                    _settle(schedule, index, message)
                elif isinstance(message, Problem):
                    worker.problem = message
                else:
                    worker.set_up = True
                    self._slots.set_up()
        except (EOFError, OSError):
            return False
        return not dead

    def _bury(self, worker: _Worker, schedule: Schedule[R]) -> None:
        """Clear up after a worker that has died, or that has closed the connection and is about to."""
        self._unregister(worker)
        # Its task may start elsewhere only when it surely does nothing any more.
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(_GRACE)
        worker.process.kill()
        how = worker.how_it_ended()
        worker.forget()
        if worker.task is not None:
            schedule.fail(worker.task, f"its worker process {how}", again=True, now=time.monotonic())
        else:
            self._false_start(worker, f"the process {how}")

    def _false_start(self, worker: _Worker, how: str) -> None:
        if worker.problem is None:
            self._slots.false_start(worker.number, how)
        elif worker.problem.input_at_fault:
            raise InputError(worker.problem.message)
        else:
            self._slots.false_start(worker.number, worker.problem.message, trace=worker.problem.trace)

    def _start_worker(self, number: int) -> None:
        environment = {**os.environ, **(self._environment(number) if self._environment is not None else {})}
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), self._setup.fileno())
        numbers = [str(value) for value in (*descriptors, os.getpid())]
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        command = [sys.executable, "-P", "-c", _START, f"worker-{number}", *numbers, path]
        with theirs, _interrupts_blocked():
            # Standard output is for the results of a command, which a task's prints must not mix with.
            process = subprocess.Popen(
                command, pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=2, env=environment
            )
            worker = self._workers[number] = _Worker(number, process, Channel(ours))
            self._selector.register(worker.channel, selectors.EVENT_READ, number)
            if worker.death is not None:
                self._selector.register(worker.death, selectors.EVENT_READ, number)

    def _unregister(self, worker: _Worker) -> None:
        self._selector.unregister(worker.channel)
        if worker.death is not None:
            self._selector.unregister(worker.death)
        del self._workers[worker.number]

    def _end_workers(self, *, at_once: bool) -> None:
        workers = list(self._workers.values())
        for worker in workers:
            if at_once or worker.task is not None or not worker.set_up:
                worker.process.kill()
            else:
                with suppress(OSError):
                    worker.channel.send(STOP)
        deadline = time.monotonic() + _GRACE
        for worker in workers:
            self._unregister(worker)
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.wait()
            worker.forget()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Let a process be started that cannot be interrupted from the keyboard before it says what that should do."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
