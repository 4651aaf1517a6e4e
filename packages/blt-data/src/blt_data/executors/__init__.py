"""Where tasks run: in this process, in processes of this machine, on a Ray cluster, or under SLURM."""

from __future__ import annotations

from blt_data.executors.base import Amounts, Executor, Report, Setup, TaskFailure, TaskFunction
from blt_data.executors.local import LocalExecutor

__all__ = ["Amounts", "Executor", "LocalExecutor", "Report", "Setup", "TaskFailure", "TaskFunction"]
