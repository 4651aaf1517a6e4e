"""torchrun's agent for one node's processes, with what a long training job needs besides.

torch's agent starts the processes, notices when one ends, and starts all again. Added here: a failure on one node ends
the job on all nodes at once and is told by its first cause; a signal reaches every process of every node, which then
write a checkpoint, and is no failure; processes that no longer react are killed after a time that users choose.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch has them there, undeclared
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from blt_train.errors import EXIT_REQUEUE, EXIT_SIGTERM, TrainingError
from blt_train.launch.board import REPORT_SECONDS, SILENCE_SECONDS, Board
from blt_train.launch.failures import (
    ALL_AGAIN,
    PEER_CAUSES,
    RUN_AGAIN,
    SEE_WHERE,
    Cause,
    Failure,
    Reason,
    process_failure,
)
from blt_train.launch.options import LaunchOptions
from blt_train.launch.rank import EXIT_INTERRUPTED, STARTS

#: How processes end that were asked to; a signal's own death is of those that had not begun to train.
STOP_STATUS = {
    EXIT_SIGTERM: EXIT_SIGTERM,
    EXIT_REQUEUE: EXIT_REQUEUE,
    EXIT_INTERRUPTED: EXIT_INTERRUPTED,
    -signal.SIGTERM: EXIT_SIGTERM,
    -signal.SIGUSR1: EXIT_REQUEUE,
    -signal.SIGINT: EXIT_INTERRUPTED,
}
#: Seconds that processes have after an interrupt, and when another has failed: there is nothing for them to save.
END_SECONDS = 5.0
#: Seconds between a first failure and the look at what else failed.
SETTLE_SECONDS = 1.0


class StopRequested(Exception):  # noqa: N818  # no error
    """A signal came while no process was running."""

    def __init__(self, signum: int) -> None:
        """Remember the signal."""
        super().__init__(signum)
        self.signum = signum


class JobAgent(LocalElasticAgent):
    """Runs one node's processes of a job."""

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, options: LaunchOptions, announce: Callable[[str], None]
    ) -> None:
        """Prepare.

        Args:
            spec: what to run.
            logs: where the processes leave their reasons.
            options: of the job.
            announce: is told each restart in one sentence.
        """
        super().__init__(spec, logs)
        self._options, self._announce = options, announce
        self._board: Board | None = None
        self._rank_store: TCPStore | None = None
        self._is_running = False
        self._starts = 0
        self._signal: int | None = None
        self._kill_at: float | None = None
        self.failure: Failure | None = None
        """Why the processes were last ended; None while nothing has failed."""
        self.stop_status: int | None = None
        """Exit status of a job that a signal ended; None for one that ran to its end."""
        self.untold: str | None = None
        """When it was stopped, if the processes have not said it themselves."""

    @property
    def board(self) -> Board | None:
        """What the nodes share; None before they have met."""
        return self._board

    # Starting.

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Number the processes by their nodes' numbers; torch would by the nodes' names."""
        options = self._options
        self._board = board = Board(store, options.node_rank, options.nodes)
        first, world_size = board.join(spec.local_world_size)
        return [
            Worker(
                local_rank=index,
                global_rank=first + index,
                role_rank=first + index,
                world_size=world_size,
                role_world_size=world_size,
            )
            for index in range(spec.local_world_size)
        ]

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other nodes, and serve the processes of this start a store of their own."""
        super()._rendezvous(worker_group)
        board, host = self._meeting(), self._options.endpoint.host if self._options.endpoint else "localhost"
        if self._options.node_rank == 0:
            # The processes' keys of an earlier start would confuse those of this one.
            self._rank_store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            board.publish("port", str(self._rank_store.port))
        port = int(board.wait_for("port"))
        worker_group.master_addr, worker_group.master_port = host, port  # type: ignore[assignment]  # None at first

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        os.environ[STARTS] = str(self._starts)
        self._starts += 1
        ids: dict[int, Any] = super()._start_workers(worker_group)
        self._is_running = True
        if self._signal is not None:
            self._forward(self._signal)
        return ids

    # Signals.

    def on_signal(self, signum: int) -> None:
        """Pass a signal on to the processes of all nodes; a second interrupt ends them at once.

        Args:
            signum: which.

        Raises:
            StopRequested: no process is running.
        """
        if not self._is_running:
            raise StopRequested(signum)
        if signum == self._signal == signal.SIGINT:
            self._kill_at = time.monotonic()
        self._forward(signum)

    def _forward(self, signum: int) -> None:
        self._signal = self._signal or signum
        if self._kill_at is None:
            grace = END_SECONDS if signum == signal.SIGINT else self._options.grace_seconds
            self._kill_at = time.monotonic() + grace
        for process in self._processes().values():
            if process.poll() is None:
                process.send_signal(signum)

    def _share_stop(self, board: Board) -> None:
        """Tell the other nodes of a signal, or hear of theirs."""
        requested = board.requested_stop()
        if self._signal is not None and requested is None:
            board.request_stop(self._signal)
        elif self._signal is None and requested is not None:
            self._forward(requested)

    # Watching.

    def _processes(self) -> dict[int, Any]:
        """Return this node's processes by local rank."""
        context = self._pcontext
        if not isinstance(context, SubprocessContext):
            return {}
        return {local_rank: handler.proc for local_rank, handler in context.subprocess_handlers.items()}

    def _exit_codes(self) -> dict[int, int | None]:
        """Return the exit statuses by local rank; None for those that run."""
        return {local_rank: process.poll() for local_rank, process in self._processes().items()}

    def _meeting(self) -> Board:
        if self._board is None:
            raise RuntimeError("the nodes have not met")
        return self._board

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Return how the processes are: all well, all ended as they should, or something failed on some node."""
        board = self._meeting()
        board.beat()
        is_alarm = board.look()
        self._share_stop(board)
        codes = self._exit_codes()
        has_failed = any(code not in (None, 0) and code not in STOP_STATUS for code in codes.values())
        if self._kill_at is not None and time.monotonic() > self._kill_at and None in codes.values():
            return self._fail(board, overdue=True)
        if has_failed or is_alarm:
            return self._fail(board)
        if None in codes.values():
            if self._kill_at is None and any(code in STOP_STATUS for code in codes.values()):
                # Signalled by someone else, as SLURM signals all processes of a job.
                self._kill_at = time.monotonic() + self._options.grace_seconds
            return RunResult(state=WorkerState.HEALTHY)
        statuses = {STOP_STATUS[code] for code in codes.values() if code in STOP_STATUS}
        if statuses:
            was_told = any(code in (EXIT_SIGTERM, EXIT_REQUEUE) for code in codes.values())
            self.stop_status, self.untold = max(statuses), None if was_told else "before the first step"
        return self._succeeded(worker_group)

    def _succeeded(self, worker_group: WorkerGroup) -> RunResult:
        values = {worker.global_rank: None for worker in worker_group.workers}
        return RunResult(state=WorkerState.SUCCEEDED, return_values=values)

    # Failing.

    def _fail(self, board: Board, *, overdue: bool = False) -> RunResult:
        """Find out, with the other nodes, what happened; end this node's processes.

        Args:
            board: of this start.
            overdue: whether the processes did not end in time after a signal.
        """
        if overdue:
            self._end_processes(0)
        else:
            self._settle()
        mine = [self._overdue()] if overdue and self._signal != signal.SIGINT else self._local_failures()
        board.report(mine)
        failure = board.agree(self._all_failures(board, mine))
        self._end_processes(END_SECONDS)
        if self._signal is not None and (failure.cause in PEER_CAUSES or self._signal == signal.SIGINT):
            # Some processes were stopped before they could agree to stop; that their peers lost them is no failure.
            self.stop_status, self.untold = STOP_STATUS[-self._signal], "before all processes had agreed on a step"
            return self._succeeded(self._worker_group)
        self.failure = failure
        if failure.is_lasting or self._signal is not None:
            self._remaining_restarts = 0
        return RunResult(state=WorkerState.FAILED)

    def _settle(self) -> None:
        """Let processes fail that would not fail by themselves, so that those are left that hang."""
        time.sleep(SETTLE_SECONDS)
        deadline = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < deadline and None in self._exit_codes().values():
            if any(failure.cause < Cause.HANGING for failure in self._local_failures()):
                return
            time.sleep(SETTLE_SECONDS / 10)

    def _all_failures(self, board: Board, mine: list[Failure]) -> list[Failure]:
        """Return the failures of all nodes, waiting for those that would explain the others."""
        begun = time.monotonic()
        while True:
            board.beat()
            reports, lost = board.reports(), board.lost_nodes()
            known = [failure for node, failures in reports.items() for failure in failures]
            known += [self._lost(board, node) for node in lost]
            waited = time.monotonic() - begun
            is_complete = len(reports) + len(set(lost) - set(reports)) >= self._options.nodes
            is_explained = any(failure.cause < Cause.HANGING for failure in known)
            if is_complete or (is_explained and waited > REPORT_SECONDS) or waited > SILENCE_SECONDS + REPORT_SECONDS:
                return known or [self._unexplained()]
            if (verdict := board.verdict()) is not None:
                return [verdict]
            time.sleep(SETTLE_SECONDS / 2)

    def _local_failures(self) -> list[Failure]:
        """Return what failed on this node, without what this agent ended itself."""
        failures = []
        codes = self._exit_codes()
        for local_rank, code in codes.items():
            if code in (None, 0) or code in STOP_STATUS:
                continue
            path = self._pcontext.error_files[local_rank] if self._pcontext is not None else ""
            failures.append(
                process_failure(
                    process=self._name(local_rank),
                    exit_code=int(code or 0),
                    reason=Reason.read_file(path),
                    now=time.time(),
                )
            )
        # Whether these hang is seen from the others' failures.
        return failures + [self._hanging(local_rank) for local_rank, code in codes.items() if code is None]

    def _name(self, local_rank: int) -> str:
        """Return a process's name in messages."""
        worker = self._worker_group.workers[local_rank]
        place = f" (on {self._meeting().hosts[self._options.node_rank]})" if self._options.nodes > 1 else ""
        return f"process {worker.global_rank} of {worker.world_size}{place}"

    def _hanging(self, local_rank: int) -> Failure:
        what = f"{self._name(local_rank)} hangs: the others waited for it as long as parallel.timeout_seconds says"
        return Failure(cause=Cause.HANGING, what=what, mend=RUN_AGAIN, time=time.time())

    def _lost(self, board: Board, node: int) -> Failure:
        what = (
            f"node {node} of {self._options.nodes} ({board.hosts[node]}) no longer answers: its launcher was killed, "
            "or the machine is gone"
        )
        return Failure(cause=Cause.NODE_LOST, what=what, mend=ALL_AGAIN, time=time.time())

    def _overdue(self) -> Failure:
        name = signal.Signals(self._signal or signal.SIGTERM).name
        what = (
            f"the processes did not end within {self._options.grace_seconds:g} seconds after {name} and were killed, "
            "so the latest checkpoint is from before"
        )
        return Failure(cause=Cause.SYSTEM, what=what, mend="; give them more time by --grace-seconds", time=time.time())

    def _unexplained(self) -> Failure:
        what = "the job was ended for a failure that no node explains"
        return Failure(cause=Cause.ERROR, what=what, mend=SEE_WHERE, time=time.time())

    # Ending.

    def _end_processes(self, seconds: float) -> None:
        """End this node's processes: politely first, by force after some seconds."""
        self._is_running = False
        alive = [process for process in self._processes().values() if process.poll() is None]
        if seconds > 0:
            for process in alive:
                process.terminate()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in alive):
            time.sleep(SETTLE_SECONDS / 10)
        for process in alive:
            if process.poll() is None:
                process.kill()
        for process in alive:
            process.wait()

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Start all processes again, after saying why."""
        if self.failure is None:
            # A node's launcher was replaced before the others missed it.
            if self._remaining_restarts == 0:
                raise TrainingError(
                    "another launcher has joined the job in the place of one that is gone, and no restart is left; "
                    "launch all nodes again to go on from the latest checkpoint"
                )
            self._remaining_restarts -= 1
        self._end_processes(END_SECONDS)
        number = self._options.max_restarts - self._remaining_restarts
        replaced = "another launcher took the place of one that is gone"
        why = self.failure.what if self.failure is not None else replaced
        self._announce(f"restart {number} of {self._options.max_restarts} from the latest checkpoint, since {why}")
        self.failure = None
        super()._restart_workers(worker_group)

    def _invoke_run(self, role: str = "default") -> RunResult:
        try:
            result: RunResult = super()._invoke_run(role)
            return result
        finally:
            self._end_processes(0)

    def _exit_barrier(self) -> None:
        """Wait until the processes of all nodes have ended as they should.

        Raises:
            TrainingError: on another node they have not.
        """
        board = self._meeting()
        board.finish()
        while not board.all_finished():
            board.beat()
            if board.look():
                board.report([])
                raise TrainingError(board.agree(self._all_failures(board, [])).sentence)
            self._share_finished_stop(board)
            time.sleep(SETTLE_SECONDS / 5)

    def _share_finished_stop(self, board: Board) -> None:
        if self._signal is not None and board.requested_stop() is None:
            board.request_stop(self._signal)
