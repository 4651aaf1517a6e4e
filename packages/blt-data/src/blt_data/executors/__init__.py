"""Where tasks run: in this process, in processes of this machine, on a Ray cluster, or under SLURM."""

from __future__ import annotations

from blt_data.executors.base import Amounts, Executor, Report, Setup, TaskFailure, TaskFunction

__all__ = ["Amounts", "Executor", "Report", "Setup", "TaskFailure", "TaskFunction"]
