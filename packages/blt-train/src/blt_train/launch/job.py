"""One node's share of a job: meet the other nodes, run the processes, and end as they ended.

Whatever a user can get wrong is checked before processes are started, as far as that is quick. If a process fails, the
others are ended, on all nodes, and every launcher tells one sentence: that of the process at fault, not those of its
peers, which only lost a connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType

import torch
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # torch has it there, undeclared
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler
from torch.distributed.launcher.api import LaunchConfig

from blt_train.config import TrainConfig
from blt_train.errors import EXIT_REQUEUE, EXIT_SIGTERM, ConfigError, TrainingError
from blt_train.inputs import check_launch
from blt_train.launch.agent import JobAgent, StopRequested
from blt_train.launch.board import Door, store_lost
from blt_train.launch.options import Endpoint, LaunchOptions
from blt_train.launch.rank import EXIT_INTERRUPTED, LAUNCHER, STARTS
from blt_train.runtime import choose_device

#: Seconds that one operation of the nodes' common store may take.
STORE_SECONDS = 20
#: Seconds of one attempt to reach the first node.
_CONNECT_SECONDS = 5
#: Seconds for which the first node tells those that come that it cannot take part.
_REFUSAL_SECONDS = 10
#: Seconds between looks at the processes.
_MONITOR_SECONDS = 0.1
#: Signals that are passed on to the processes; a hang-up as SIGTERM.
_PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
}
_STATUS = {signal.SIGTERM: EXIT_SIGTERM, signal.SIGUSR1: EXIT_REQUEUE, signal.SIGINT: EXIT_INTERRUPTED}


def count_devices(config: TrainConfig) -> int:
    """Return how many processes make use of this machine: one per GPU, or one for its CPUs.

    Args:
        config: the device is read.
    """
    return max(1, torch.cuda.device_count()) if config.device != "cpu" and torch.cuda.is_available() else 1


def check_processes(config: TrainConfig, options: LaunchOptions) -> None:
    """Check a config for a job, before any process is started.

    Args:
        config: of the run.
        options: of the job.

    Raises:
        ConfigError: the batch does not divide among the processes, there are too few GPUs, or anything that
            `check_launch` finds.
    """
    check_launch(config, options.world_size)
    choose_device(config.device, options.processes - 1)


def tell_refusal(options: LaunchOptions, sentence: str) -> None:
    """Tell the launchers of the other nodes that this one cannot take part, so that they need not wait for it.

    Args:
        options: of the job.
        sentence: why.
    """
    endpoint = options.endpoint
    if endpoint is None or options.nodes == 1:
        return
    # Nobody may be there to hear it, which is then soon told there.
    with contextlib.suppress(DistError, ConfigError), _quiet_torch():
        brief = dataclasses.replace(options, join_seconds=_CONNECT_SECONDS)
        store = _meeting_store(brief)
        Door(store, options.job_id, options.node_rank, options.nodes).refuse(sentence)
        if options.node_rank == 0:
            time.sleep(_REFUSAL_SECONDS)


def launch_processes(
    arguments: Sequence[str], options: LaunchOptions, announce: Callable[[str], None] = lambda _: None
) -> None:
    """Run `blt-train` with these arguments in this node's processes of a job and wait for the whole job.

    Args:
        arguments: of `blt-train`, such as ["launch", "config.yaml"].
        options: of the job.
        announce: is told of restarts and the like, one sentence each.

    Raises:
        TrainingError: a process failed, on whatever node; the message is its own, or says which one died of what.
        ConfigError: the nodes did not come together as the options say.
        SystemExit: a signal ended the job: status 143 after SIGTERM and 75 after SIGUSR1.
        KeyboardInterrupt: SIGINT did.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet_torch())
        stack.enter_context(_environment({LAUNCHER: str(os.getpid()), STARTS: "0"}))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="blt-train-"))
        signals = stack.enter_context(_Signals())
        try:
            _Job(arguments, options, announce, folder, signals).run()
        except StopRequested as stop:
            _leave_stopped(_STATUS[signal.Signals(stop.signum)], announce, "before the first step")
        except SignalException as error:
            raise SystemExit(128 + int(error.sigval)) from error


class _Job:
    """What `launch_processes` does, with what it needs at hand."""

    def __init__(
        self,
        arguments: Sequence[str],
        options: LaunchOptions,
        announce: Callable[[str], None],
        folder: str,
        signals: _Signals,
    ) -> None:
        self._arguments, self._options, self._announce = arguments, options, announce
        self._folder, self._signals = folder, signals

    def run(self) -> None:
        """Run the processes, and end as they ended."""
        options = self._options
        store = _meeting_store(options)
        if options.nodes > 1:
            Door(store, options.job_id, options.node_rank, options.nodes).wait(options.join_seconds)
        handler = _rendezvous_handler(store, options)
        logs = DefaultLogsSpecs(log_dir=self._folder)
        agent = JobAgent(self._spec(handler, logs), logs, options, self._announce)
        self._signals.pass_to(agent.on_signal)
        result = self._run(agent)
        # The first node serves what the others have yet to read.
        with contextlib.suppress(Exception):
            handler.shutdown()
            if agent.board is not None:
                agent.board.leave(is_host=options.node_rank == 0)
        self._signals.pass_to(None)
        if agent.stop_status is not None:
            _leave_stopped(agent.stop_status, self._announce, agent.untold)
        if isinstance(result, TrainingError):
            raise result
        if agent.failure is not None and result.is_failed():
            raise TrainingError(agent.failure.sentence)

    def _run(self, agent: JobAgent) -> RunResult | TrainingError:
        """Return how the processes ended, or what ended them."""
        options = self._options
        try:
            result: RunResult | None = agent.run()
        except RendezvousTimeoutError as error:
            raise ConfigError(
                f"the launchers of {options.nodes} nodes did not come together at {options.endpoint} within "
                f"{options.join_seconds} seconds: start `blt-train launch` on every node, with the same "
                "--rdzv-endpoint and --rdzv-id"
            ) from error
        except RendezvousClosedError as error:
            raise ConfigError(
                f"the job {options.job_id} at {options.endpoint} has ended; launch all nodes again, with another "
                "--rdzv-id"
            ) from error
        except (DistError, RendezvousConnectionError) as error:
            raise store_lost(options.endpoint) from error
        except TrainingError as error:
            return error
        if result is None:
            # What torch's agent returns where others had taken all places, and have ended.
            raise ConfigError(
                f"the job {options.job_id} at {options.endpoint} had all its {options.nodes} nodes without this one; "
                "give each launcher a --node-rank of its own"
            )
        return result

    def _spec(self, handler: DynamicRendezvousHandler, logs: DefaultLogsSpecs) -> WorkerSpec:
        """Return what torch's agent runs, bound to NUMA nodes as torchrun would."""
        options = self._options
        config = LaunchConfig(
            min_nodes=options.nodes,
            max_nodes=options.nodes,
            nproc_per_node=options.processes,
            run_id=options.job_id,
            max_restarts=options.max_restarts,
            logs_specs=logs,
        )
        return WorkerSpec(
            role="rank",
            local_world_size=options.processes,
            rdzv_handler=handler,
            entrypoint=sys.executable,
            args=("-m", "blt_train", *self._arguments),
            max_restarts=options.max_restarts,
            monitor_interval=_MONITOR_SECONDS,
            numa_options=config.numa_options,
        )


def _leave_stopped(status: int, announce: Callable[[str], None], untold: str | None) -> None:
    """End as a signal demands, telling when it came if the processes have not told it themselves."""
    if status == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if untold is not None:
        name = "SIGUSR1" if status == EXIT_REQUEUE else "SIGTERM"
        announce(f"stopped by {name} {untold}; run the same command again to go on")
    raise SystemExit(status)


def _meeting_store(options: LaunchOptions) -> TCPStore:
    """Serve the nodes' common store on the first node, or connect to it from another.

    Raises:
        ConfigError: it cannot be served or reached.
    """
    endpoint = options.endpoint or Endpoint(host="localhost", port=0)
    endpoint.check_host()
    operation = timedelta(seconds=STORE_SECONDS)
    if options.node_rank == 0:
        try:
            return TCPStore(
                endpoint.host,
                endpoint.port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=operation,
            )
        except DistError as error:
            raise ConfigError(
                f"--rdzv-endpoint {endpoint} cannot be served from here: it must name this machine, since --node-rank "
                "is 0, and a port that no other program uses"
            ) from error
    deadline = time.monotonic() + options.join_seconds
    while True:
        # Short attempts, since no signal is handled during one.
        attempt = timedelta(seconds=min(_CONNECT_SECONDS, options.join_seconds))
        try:
            store = TCPStore(endpoint.host, endpoint.port, is_master=False, timeout=attempt)
        except DistError as error:
            if time.monotonic() < deadline:
                time.sleep(_MONITOR_SECONDS)
                continue
            raise ConfigError(
                f"the first node's launcher does not answer at {endpoint} after {options.join_seconds} seconds: start "
                "`blt-train launch --node-rank 0` there, and see that the port can be reached from here"
            ) from error
        store.set_timeout(operation)
        return store


def _rendezvous_handler(store: TCPStore, options: LaunchOptions) -> DynamicRendezvousHandler:
    """Return what brings the agents of all nodes together, in the first place and after each failure."""
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=str(options.endpoint or ""),
        run_id=options.job_id,
        min_nodes=options.nodes,
        max_nodes=options.nodes,
        local_addr="localhost" if options.endpoint is None else None,
        join_timeout=options.join_seconds,
    )
    handler: DynamicRendezvousHandler = create_handler(store, C10dRendezvousBackend(store, options.job_id), parameters)
    return handler


class _Signals(contextlib.AbstractContextManager["_Signals"]):
    """Handles the signals that end a job, while the block runs."""

    def __init__(self) -> None:
        self._receiver: Callable[[int], None] | None = None
        self._before: dict[int, object] = {}
        self._is_over = False

    def pass_to(self, receiver: Callable[[int], None] | None) -> None:
        """Choose who hears of signals.

        Args:
            receiver: is called with each; None when the job is over, and it is too late for them.
        """
        self._receiver, self._is_over = receiver, receiver is None

    def __enter__(self) -> _Signals:
        for number in _PASSED_ON:
            handler = signal.getsignal(number)
            if number == signal.SIGHUP and handler == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = handler
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as `getsignal` returned it

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        passed = _PASSED_ON[signal.Signals(number)]
        if self._receiver is not None:
            self._receiver(passed)
        elif not self._is_over:
            raise StopRequested(passed)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep torch's agent from telling at length what is told here in one sentence."""
    logger = logging.getLogger("torch.distributed.elastic")
    if os.environ.get("BLT_TRACEBACK"):
        yield
        return
    silent = logging.NullHandler()
    before = logger.propagate
    # Not by a level: torch gives each module's logger one of its own.
    logger.addHandler(silent)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(silent)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, for the processes to inherit, while the block runs."""
    # torch's agent would handle these by ending the processes; SIGQUIT it may.
    values = {**values, "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT"}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
