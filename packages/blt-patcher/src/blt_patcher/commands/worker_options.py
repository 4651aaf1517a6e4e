"""Options that say where shards are patched: in this process, in several of this machine, or on a Ray cluster."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from blt_data.errors import InputError
from blt_data.openmp import spin_less
from blt_patcher.commands.options import combine_options

if TYPE_CHECKING:
    from blt_data.executors import Executor


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerOptions:
    """What the command line says of the workers."""

    executor: str = "local"
    workers: int | None = None
    num_gpus: float | None = None
    num_cpus: float = 1.0
    ray_address: str = "auto"
    ray_timeout: float = 600.0

    def device(self, wanted: str | None) -> str:
        """Return the kind of device that workers score on: `cpu` or `cuda`.

        Args:
            wanted: what `--device` says; None takes GPUs if there are any.

        Raises:
            InputError: GPUs are asked for and ruled out at once.
        """
        kind = (wanted or "").split(":")[0]
        if self.executor == "ray":
            kind = kind or ("cuda" if self.num_gpus else "cpu")
            if kind == "cuda" and not self.num_gpus:
                raise InputError("--device cuda on Ray needs --num-gpus, which reserves them; give --num-gpus 1")
            return kind
        if self.num_gpus is not None:
            raise InputError("--num-gpus is for --executor ray; on this machine each worker takes one GPU")
        if self.ray_address != "auto":
            raise InputError("--ray-address is for --executor ray; give that too, or leave the address out")
        if kind:
            return kind
        return "cuda" if visible_gpus() else "cpu"

    def start(self, device: str) -> Executor | None:
        """Return the executor, or None to patch in this process.

        Args:
            device: the kind of device that workers score on.

        Raises:
            InputError: Ray is asked for and not installed, or a number is out of range.
        """
        from blt_data.executors.local import LocalExecutor

        self._check_numbers()
        if self.executor == "local":
            if (self.workers or 1) == 1:
                return None
            workers = self.workers or 1
            environment = _one_gpu_each() if device == "cuda" else _share_of_cores(workers)
            return LocalExecutor(workers, worker_environment=environment)
        from blt_data.executors.ray import RayExecutor

        return RayExecutor(
            self.ray_address,
            self.workers,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus or 0,
            name="blt-patch",
            packages=("blt-data", "blt-patcher"),
            place_timeout=self.ray_timeout,
        )

    def _check_numbers(self) -> None:
        """Refuse what is no number: it passes every comparison with a limit."""
        for name in ("num_gpus", "num_cpus", "ray_timeout"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be a finite number")


_options = combine_options(
    click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Patch on this machine or on a Ray cluster.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Shards patched at once, on a GPU each if there are any  [1; on Ray as many as there is room for].",
    ),
    click.option("--num-gpus", type=float, metavar="G", help="GPUs that each Ray worker reserves  [0]."),
    click.option(
        "--num-cpus",
        type=float,
        default=1.0,
        show_default=True,
        metavar="C",
        help="CPUs that each Ray worker reserves.",
    ),
    click.option(
        "--ray-address", default="auto", show_default=True, metavar="A", help="The cluster: auto, host:port or ray://…"
    ),
    click.option(
        "--ray-timeout",
        type=float,
        default=600.0,
        show_default=True,
        metavar="S",
        help="Seconds to wait for room on the cluster.",
    ),
)


def worker_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options on where to patch; the command gets them as one argument, `placing`: a `WorkerOptions`."""
    names = [field.name for field in fields(WorkerOptions)]

    @functools.wraps(command)
    def gathered(*args: Any, **values: Any) -> Any:
        placing = WorkerOptions(**{name: values.pop(name) for name in names})
        return command(*args, placing=placing, **values)

    return _options(gathered)


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that processes of this one may use, as CUDA_VISIBLE_DEVICES has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    spin_less()
    try:
        import torch
    except ModuleNotFoundError:
        return []
    return [str(index) for index in range(torch.cuda.device_count())]


def _one_gpu_each() -> Callable[[int], Mapping[str, str]]:
    gpus = visible_gpus()
    if not gpus:
        raise InputError("there is no GPU for the workers; give --device cpu")
    return lambda number: {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}


def _share_of_cores(workers: int) -> Callable[[int], Mapping[str, str]]:
    """Workers that each take all cores would wait for each other most of the time."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    return lambda _: {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}


def parse_shards(text: str, count: int) -> list[int]:
    """Return the shard indices that `--only-shards` names.

    Args:
        text: numbers and ranges, both ends included, such as `3-17,20`.
        count: shards that there are.

    Raises:
        InputError: it is no such list, or names a shard that there is not.
    """
    chosen: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InputError(f"--only-shards {text!r} is no list of shards; write numbers and ranges, such as 3-17,20")
        if last >= count:
            raise InputError(f"--only-shards names shard {last}, and the last of {count} shards is {count - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)
