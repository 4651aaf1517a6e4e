"""What a user says of SLURM jobs; apart from what submits them, which needs datatrove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blt_data.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmOptions:
    """Options of SLURM jobs, by sbatch's names where it has them."""

    partition: str
    time: str = "24:00:00"
    """Limit of each task."""
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    """Gigabytes."""
    account: str | None = None
    qos: str | None = None
    workers: int | None = None
    """Tasks at once; None leaves it to SLURM."""
    venv: Path | None = None
    """Virtual environment to activate; None puts the folder of this Python first in PATH."""
    env_command: str | None = None
    """Shell command that makes the environment, instead."""
    max_array_size: int = 1001
    """SLURM's MaxArraySize; more tasks become several arrays, one after another."""
    tasks_per_job: int = 1
    """Tasks that each element of an array does, one after another."""
    requeue: bool = True
    """Run a task again whose node failed or that was preempted."""
    sbatch: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch, without their dashes."""
    dry_run: bool = False
    """Make the scripts and submit nothing."""

    def __post_init__(self) -> None:
        for name in ("cpus_per_task", "mem_per_cpu_gb", "tasks_per_job", "max_array_size"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"SLURM: {name.replace('_', ' ')} must be at least 1, not {value}")
