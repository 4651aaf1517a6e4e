"""Stages of datatrove blocks as SLURM job arrays, each waiting for the one before."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from blt_data.console import print_table
from blt_data.errors import InputError
from blt_data.executors.slurm_options import SlurmOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Blocks that run for a number of ranks, independently of each other."""

    name: str
    """One word, for the names of jobs and folders."""
    blocks: Sequence[PipelineStep | Callable[..., Any]]
    """In their order; they must find out by themselves what of a rank is done already."""
    ranks: int
    done: Callable[[int], bool] = field(default=lambda rank: False)
    """Whether a rank need not be submitted, because it has been done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedStage:
    """What became of a stage."""

    name: str
    tasks: int
    """Ranks that were submitted."""
    job_id: str | None
    """Of the (last) job array; None if nothing was to be done, or for a dry run."""
    logs: Path
    """Folder of what the tasks print."""
    script: str
    """The batch script."""


class _StageExecutor(SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove is untyped
    """datatrove's executor, without its own notion of what is done.

    Its marks of completion would outlive what they stand for, such as an output that was deleted.
    """

    def __init__(self, stage: Stage, options: SlurmOptions, **arguments: Any) -> None:
        super().__init__(list(stage.blocks), stage.ranks, skip_completed=False, **arguments)
        self.missing = [rank for rank in range(stage.ranks) if not stage.done(rank)]

    def get_incomplete_ranks(self, ranks: Any = None, skip_completed: Any = None) -> list[int]:
        """Return the ranks that were not done when the job was submitted."""
        return self.missing

    def launch_merge_stats(self) -> None:
        """Submit no further job: the records of our tasks hold their counts."""

    def script(self) -> str:
        """Return the batch script that `launch_job` submits."""
        jobs = -(-len(self.missing) // self.tasks_per_job)
        array = jobs if self.max_array_size == -1 else min(jobs, self.max_array_size)
        srun = " ".join(f"--{name}={value}" for name, value in self.srun_args.items())
        pickled = self.logging_dir.resolve_paths("executor.pik")
        command = f"srun {srun} -l -n {self.nodes_per_task} launch_pickled_pipeline {pickled}"
        return str(self.get_launch_file_contents(self.get_sbatch_args(array), command))


def submit(
    stages: Sequence[Stage],
    options: SlurmOptions,
    *,
    name: str,
    logs: Path,
) -> tuple[SubmittedStage, ...]:
    """Submit stages so that each starts when all tasks of the one before have succeeded.

    A stage whose predecessor fails is cancelled by SLURM. The same call again submits what is missing.

    Args:
        stages: in their order.
        options: of the jobs.
        name: of the jobs.
        logs: a directory that all nodes see; it gets a folder per stage.

    Raises:
        InputError: SLURM is not there, or refused a job.
    """
    submitted = []
    before: _StageExecutor | None = None
    for stage in stages:
        executor = _StageExecutor(stage, options, **_arguments(stage, options, name, logs, before))
        script = executor.script() if executor.missing else ""
        if options.dry_run:
            _remove_empty(logs / stage.name / "output", logs / stage.name, logs)
        else:
            _launch(executor)
        job_id = None if executor.job_id in (None, -1) else str(executor.job_id)
        submitted.append(
            SubmittedStage(
                name=stage.name, tasks=len(executor.missing), job_id=job_id, logs=logs / stage.name, script=script
            )
        )
        if executor.missing:
            before = executor
    return tuple(submitted)


def _arguments(
    stage: Stage,
    options: SlurmOptions,
    name: str,
    logs: Path,
    before: _StageExecutor | None,
) -> dict[str, Any]:
    """Return the arguments of datatrove's executor."""
    extra = {"kill-on-invalid-dep": "yes", **options.sbatch}
    if options.account is not None:
        extra["account"] = options.account
    folder = (logs / stage.name).absolute()
    return {
        "time": options.time,
        "partition": options.partition,
        "cpus_per_task": options.cpus_per_task,
        "mem_per_cpu_gb": options.mem_per_cpu_gb,
        "workers": -1 if options.workers is None else options.workers,
        "job_name": f"{name}-{stage.name}",
        "qos": options.qos,
        "env_command": _environment_command(options),
        "sbatch_args": extra,
        "max_array_size": options.max_array_size,
        "tasks_per_job": options.tasks_per_job,
        "depends": before,
        "logging_dir": str(folder),
        "slurm_logs_folder": str(folder / "output"),
        # Since SLURM 22.05 a step no longer inherits the CPUs of its job.
        "srun_args": {"cpus-per-task": options.cpus_per_task},
        "requeue": options.requeue,
        "mail_type": "NONE",
    }


def _environment_command(options: SlurmOptions) -> str:
    """Return the shell command that gives a job this command's Python, or the one that the user names."""
    if options.env_command is not None:
        return options.env_command
    if options.venv is not None:
        return f"source {shlex.quote(str(options.venv / 'bin' / 'activate'))}"
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def show(stages: Sequence[SubmittedStage], options: SlurmOptions, *, result: str) -> None:
    """Print what was submitted and what to look at; for a dry run, the scripts.

    Args:
        stages: what `submit` returned.
        options: of the jobs.
        result: how to see that all is done, as a clause.
    """
    if options.dry_run:
        before = ""
        for stage in stages:
            click.echo(f"# {stage.name}: {stage.tasks} tasks, sbatch{before}")
            click.echo(stage.script)
            before = f" --dependency=afterok:<job of {stage.name}>"
        return
    rows = [(stage.name, stage.tasks, stage.job_id or "done already", stage.logs / "output") for stage in stages]
    print_table("submitted", rows, ("stage", "tasks", "job", "what its tasks print"))
    jobs = ",".join(stage.job_id for stage in stages if stage.job_id is not None)
    if jobs:
        click.echo(f"squeue -j {jobs} shows what runs, sacct -j {jobs} what became of it; {result}.", err=True)
        click.echo(
            "If a task fails, mend its cause and run the same command again: it submits what is missing.", err=True
        )


def _launch(executor: _StageExecutor) -> None:
    with _quiet_datatrove():
        try:
            executor.launch_job()
        except FileNotFoundError as error:
            if error.filename != "sbatch":
                raise
            raise InputError(
                "there is no sbatch here; run this on a machine of the SLURM cluster, or add --slurm-dry-run"
            ) from error
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"sbatch refused the job (status {error.returncode}, see its message above); "
                "check the partition, time, account and qos"
            ) from error


@contextmanager
def _quiet_datatrove() -> Iterator[None]:
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")
