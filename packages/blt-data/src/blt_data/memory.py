"""How much memory a job may use, and how many workers that is enough for.

The limit holds for the processes' own memory, of all of them together; what the system keeps of files in its page cache
is not counted, as the system takes that back by itself. A single document larger than its share cannot be helped: it
is held whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blt_data.documents import BATCH_BYTES
from blt_data.errors import InputError
from blt_data.units import format_bytes

#: What a process takes before it reads anything: the interpreter, Arrow, datatrove.
_PROCESS: Final = 120_000_000

#: Batches that exist at once beside the buffer: the reader's, decoded and not, and the one being handed over.
_BATCHES: Final = 6

#: The least buffer that is worth sorting.
_LEAST_BUFFER: Final = 8 << 20

#: Part of the buffer that allocators and sorting take on top of what is counted.
_SLACK: Final = 1.3

#: Of a worker on a machine that we do not know.
_ELSEWHERE: Final = 2 << 30

#: Bytes of a group's bookkeeping per document: table, sort orders, ids.
_PER_DOCUMENT: Final = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What the memory is divided into."""

    limit_bytes: int
    """Of all local processes together, or of each worker where they run elsewhere."""
    on_one_machine: bool
    workers: int
    """Of the scatter stage."""
    buffer_bytes: int
    """Memory at which a scatter task writes a sub-run."""

    def gather_workers(self, content_bytes: int, documents: int) -> int:
        """Return how many workers may gather at once; at least one.

        Args:
            content_bytes: of the largest group.
            documents: of the group of most documents.
        """
        if not self.on_one_machine:
            return self.workers
        need = content_bytes * _SLACK + documents * _PER_DOCUMENT + _BATCHES * BATCH_BYTES
        for workers in range(self.workers, 1, -1):
            if workers * (need + _PROCESS) + _PROCESS <= self.limit_bytes:
                return workers
        return 1


def plan_memory(
    *, limit_bytes: int | None, workers: int, on_one_machine: bool, shard_bytes: int, unit_bytes: int
) -> MemoryPlan:
    """Divide the memory among workers, of which there may be fewer than asked for.

    Args:
        limit_bytes: of all local processes together, or of each worker where they run elsewhere; None takes half of
            what this machine has, or 2 GiB elsewhere.
        workers: how many there may be at most.
        on_one_machine: whether they share this machine's memory.
        shard_bytes: content bytes per shard.
        unit_bytes: the most bytes of text that a file makes its reader hold at once: its largest row group.

    Raises:
        InputError: it is not enough for one worker.
    """
    usual = machine_memory() // 2 if on_one_machine else _ELSEWHERE
    limit = usual if limit_bytes is None else limit_bytes
    reading = _BATCHES * BATCH_BYTES + unit_bytes
    least = max(reading + _LEAST_BUFFER * _SLACK, shard_bytes * _SLACK + _BATCHES * BATCH_BYTES)
    for count in range(workers if on_one_machine else 1, 0, -1):
        # One local worker is this process itself.
        processes = count + 1 if count > 1 else 1
        share = (limit - processes * _PROCESS) / count
        if share >= least:
            return MemoryPlan(
                limit_bytes=limit,
                on_one_machine=on_one_machine,
                workers=count if on_one_machine else workers,
                buffer_bytes=int((share - reading) / _SLACK),
            )
    raise InputError(
        f"a memory limit of {format_bytes(limit)} is too little for shards of {format_bytes(shard_bytes)} and a source "
        f"whose parts have up to {format_bytes(unit_bytes)}: one worker needs {format_bytes(_PROCESS + least)}; "
        "raise --memory-limit or lower --shard-size"
    )


def machine_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's if that is less."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            most = min(most, int(text))
    return most
