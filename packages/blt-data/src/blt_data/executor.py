"""datatrove's local executor, with an end: a failed or killed worker stops the run, and workers never outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from blt_data.errors import InputError
from blt_data.pipeline import report
from blt_data.staging import read_record

Amounts = tuple[int, int, int]

_POLL_SECONDS = 0.2


class ShardExecutor(LocalPipelineExecutor):  # type: ignore[misc]  # datatrove is untyped
    """Run a pipeline that ends in a `ShardWriter`.

    It differs from its base in three ways: a task is complete when its record says so; the death of a worker (out of
    memory, say) ends the run with an error, where a multiprocessing pool would wait for ever; and workers end with
    the process that started them, even if that is killed.

    Args:
        pipeline: the blocks.
        folders: each rank's folder.
        workers: processes; 1 runs in this one.
        logging_dir: where datatrove keeps its logs and statistics.
        on_progress: called in this process with source bytes, documents and content bytes since the last call.
    """

    def __init__(
        self,
        pipeline: list[PipelineStep],
        *,
        folders: Sequence[Path],
        workers: int,
        logging_dir: Path,
        on_progress: Callable[[int, int, int], None] | None,
    ) -> None:
        super().__init__(pipeline, tasks=len(folders), workers=workers, logging_dir=str(logging_dir))
        self.folders = folders
        self.on_progress = on_progress

    def is_rank_completed(self, rank: int) -> bool:
        """Return whether a task has its record and all its shards.

        Args:
            rank: index of the task.
        """
        return read_record(self.folders[rank]) is not None

    def run(self) -> None:
        """Run every task that is not complete.

        Raises:
            InputError: bad input, or a worker was killed.
            OSError: the output cannot be written.
        """
        ranks = [rank for rank in range(self.tasks) if not self.is_rank_completed(rank)]
        with _quiet_datatrove():
            if self.workers == 1 or len(ranks) == 1:
                self._run_here(ranks)
            elif ranks:
                self._run_in_workers(ranks)

    def _run_here(self, ranks: Sequence[int]) -> None:
        report.sink = self.on_progress
        try:
            for rank in ranks:
                self._run_for_rank(rank)
        finally:
            report.sink = None

    def _run_in_workers(self, ranks: Sequence[int]) -> None:
        # A fork server gives workers nothing but what is handed to them (no locks, no copy of the stop pipe's writing
        # end), and imports datatrove once for all of them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        stop_reader, stop_writer = context.Pipe(duplex=False)
        reports: SimpleQueue[Amounts] = context.SimpleQueue()
        on_progress, self.on_progress = self.on_progress, None
        with ProcessPoolExecutor(
            min(self.workers, len(ranks)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(self, stop_reader, reports),
        ) as pool:
            try:
                futures = {pool.submit(_run_rank, rank) for rank in ranks}
                while futures:
                    done, futures = wait(futures, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                    while not reports.empty():
                        amounts = reports.get()
                        if on_progress is not None:
                            on_progress(*amounts)
                    for future in done:
                        future.result()
            except BrokenProcessPool:
                stop_writer.close()
                raise InputError(
                    "a worker process was killed, perhaps for lack of memory; "
                    "run the same command again with fewer --workers or a smaller --shard-size"
                ) from None
            except BaseException:
                # Workers that still run must not write on after an error.
                stop_writer.close()
                raise
        stop_writer.close()


_executor: ShardExecutor | None = None


def _start_worker(executor: ShardExecutor, stop: Connection, reports: SimpleQueue[Amounts]) -> None:
    """Set up a worker: it ends when the starting process closes its end of the stop pipe, or dies."""
    global _executor  # a pool's initializer has no other way to hand something to its tasks
    _executor = executor
    # The starting process decides what an interrupt from the keyboard means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logger.disable("datatrove")
    report.sink = lambda *amounts: reports.put(amounts)
    threading.Thread(target=_end_with_starter, args=(stop,), daemon=True).start()


def _end_with_starter(stop: Connection) -> None:
    try:
        stop.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _run_rank(rank: int) -> None:
    if _executor is None:
        raise RuntimeError("the worker was not set up")
    _executor._run_for_rank(rank)


@contextmanager
def _quiet_datatrove() -> Iterator[None]:
    """Keep datatrove's log lines off the terminal: it would print every error twice, with a traceback."""
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")
