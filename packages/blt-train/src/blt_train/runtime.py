"""Where a training process runs: its rank, its device, its arithmetic, and sums over all ranks.

One process needs no process group. Under torchrun (recognised by its environment variables) every process joins one,
gloo for CPU and NCCL for CUDA.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from blt_train.config import Precision, TrainConfig
from blt_train.errors import ConfigError, TrainingError
from blt_train.parallel.mesh import make_mesh

#: What the messages of torch's plain errors hold that tell of too little memory on CPU.
_CPU_MEMORY_WORDS = ("can't allocate memory", "DefaultCPUAllocator: not enough memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """This process among the processes of the job."""

    device: torch.device
    """Where the model lives."""

    rank: int = 0
    """Number of this process among all."""

    world_size: int = 1
    """Number of processes."""

    mesh: DeviceMesh | None = None
    """All processes as a mesh, over which the model is spread; None for one process, whose model is plain."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: Sequence[float] | torch.Tensor) -> list[float]:
        """Return sums over all ranks.

        Args:
            values: equally many numbers on every rank.
        """
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        result: list[float] = total.tolist()
        return result


def launched_world_size() -> int:
    """Return the number of processes of the job that this process was launched in; 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that a config names.

    Args:
        name: `auto`, `cpu` or `cuda`.
        local_rank: which GPU of this machine.

    Raises:
        ConfigError: CUDA is asked for and not there, or there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(
            f"device is {name}, but process {local_rank} of this machine finds {count} CUDA device(s): use device=cpu "
            "or fewer processes"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def open_runtime(config: TrainConfig) -> Iterator[Runtime]:
    """Join the job and set the process up; leave it afterwards.

    Args:
        config: device, threads, precision and processes are read.

    Yields:
        This process's place.

    Raises:
        ConfigError: the device is not there, or the processes do not divide into copies of the model.
    """
    world_size = launched_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if world_size > 1 else 0
    device = choose_device(config.device, local_rank)
    shard_size = config.parallel.shard_size(world_size)
    threads_before, matmul_before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif world_size > 1:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    # What autocast leaves in float32 may use TF32; a float32 run keeps all its bits.
    torch.set_float32_matmul_precision("high" if config.precision is Precision.BFLOAT16 else "highest")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        timeout = datetime.timedelta(seconds=config.parallel.timeout_seconds)
        if device.type == "cuda":
            # gloo beside it, for what lies in the host's memory.
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    is_orderly = False
    try:
        rank = dist.get_rank() if world_size > 1 else 0
        mesh = make_mesh(device, world_size, shard_size) if world_size > 1 else None
        yield Runtime(device=device, rank=rank, world_size=world_size, mesh=mesh)
        is_orderly = True
    finally:
        # After a failure NCCL would wait here for operations that others never join, and keep the launcher waiting for
        # the reason.
        if world_size > 1 and (is_orderly or device.type != "cuda"):
            dist.destroy_process_group()
        torch.set_num_threads(threads_before)
        torch.set_float32_matmul_precision(matmul_before)


@contextlib.contextmanager
def telling_of_memory() -> Iterator[None]:
    """Tell in one sentence that a device has too little memory for what the block does.

    Raises:
        TrainingError: in place of torch's errors for GPUs and CPU.
    """
    try:
        yield
    except RuntimeError as error:
        is_gpus = isinstance(error, torch.OutOfMemoryError)
        if not is_gpus and not any(word in str(error) for word in _CPU_MEMORY_WORDS):
            raise
        raise TrainingError(
            f"the {'GPU' if is_gpus else 'machine'} has too little memory for the run: lower "
            "batch.sequences_per_micro_batch or data.sequence_tokens, or spread the run over more processes"
        ) from error


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context in which forward passes run.

    Args:
        device: of the model.
        precision: float32 leaves everything as it is.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is Precision.BFLOAT16)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: allocated on the GPU, or resident in RAM for CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Return the most memory that torch's allocator has taken from the GPU so far; None for CPU."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None
