"""This rank's micro batches, made ahead by threads.

Which sequences a micro batch holds follows from (step, micro batch, rank, world size) alone, and the union over ranks
and micro batches of a step does not depend on the number of ranks. So any thread can make any micro batch, and the
only state is the step. Nearly all work is in kernels that do not hold Python's lock.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from blt_train.batches import BatchBuilder, MicroBatch
from blt_train.sequences import SequenceStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Which part of each global batch a rank reads, in which portions."""

    sequences_per_step: int
    """Sequences in a global batch."""

    sequences_per_micro_batch: int
    """Sequences in one micro batch of one rank."""

    rank: int = 0
    """This rank."""

    world_size: int = 1
    """Number of ranks."""

    @property
    def micro_batches(self) -> int:
        """Micro batches per step and rank; the config has checked that it is a whole number."""
        return self.sequences_per_step // (self.sequences_per_micro_batch * self.world_size)

    def sequences(self, step: int, micro_batch: int) -> range:
        """Return the stream's sequences of one micro batch of a step; steps and micro batches count from 0."""
        portion = micro_batch * self.world_size + self.rank
        first = step * self.sequences_per_step + portion * self.sequences_per_micro_batch
        return range(first, first + self.sequences_per_micro_batch)


class Loader:
    """This rank's micro batches of steps [first_step, end_step).

    A context manager: leaving it ends the threads, which drop what they have not begun. What goes wrong in a thread is
    raised where the batch in question is read.
    """

    def __init__(
        self,
        stream: SequenceStream,
        part: Slice,
        *,
        first_step: int,
        end_step: int,
        workers: int = 1,
        prefetch: int = 4,
        pin: bool = False,
        static_shapes: bool = False,
    ) -> None:
        """Prepare the loader; the threads start with the first batch that is read.

        Args:
            stream: the sequences of training.
            part: which of them this rank reads.
            first_step: step to begin with, from 0: all the state there is.
            end_step: step to end before.
            workers: threads that build batches; 0 builds each when it is asked for.
            prefetch: micro batches that are ready or being built ahead of the one that is read; at least 1, and never
                fewer than workers.
            pin: make pinned tensors; the present CUDA device is the one to copy to.
            static_shapes: see `BatchBuilder`.
        """
        self._stream = stream
        self._part = part
        self._steps = range(first_step, end_step)
        self._builder = BatchBuilder(
            stream.capacity, part.sequences_per_micro_batch, pin=pin, static_shapes=static_shapes
        )
        self._ahead = max(prefetch, workers)
        self._pool: ThreadPoolExecutor | None = None
        if workers:
            # A new thread's CUDA device is the first one, whatever this one's is.
            start = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if pin else None
            self._pool = ThreadPoolExecutor(workers, "loader", initializer=start)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def batch(self, step: int, micro_batch: int) -> MicroBatch:
        """Build one micro batch here and now, whatever the threads do."""
        chosen = self._part.sequences(step, micro_batch)
        return self._builder.build(self._stream.sequences(chosen.start, len(chosen)))

    def __iter__(self) -> Iterator[MicroBatch]:
        tasks = ((step, micro_batch) for step in self._steps for micro_batch in range(self._part.micro_batches))
        if self._pool is None:
            yield from itertools.starmap(self.batch, tasks)
            return
        pending: deque[Future[MicroBatch]] = deque()
        for task in itertools.islice(tasks, self._ahead):
            pending.append(self._pool.submit(self._work, *task))
        while pending:
            batch = pending.popleft()
            for task in itertools.islice(tasks, 1):
                pending.append(self._pool.submit(self._work, *task))
            yield batch.result()

    def _work(self, step: int, micro_batch: int) -> MicroBatch:
        """Build one micro batch in a thread, and see to it that what comes after it is planned in time."""
        batch = self.batch(step, micro_batch)
        chosen = self._part.sequences(step, micro_batch)
        self._stream.plan_ahead(chosen.start, len(chosen))
        return batch
