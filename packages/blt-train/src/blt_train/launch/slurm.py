"""Training as a SLURM job: what a user can say of it, and its submission."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blt_train.errors import ConfigError, TrainingError
from blt_train.files import replace_text

#: Folder of a run directory for scripts and logs.
FOLDER_NAME = "slurm"
SCRIPT_NAME = "launch.sbatch"
#: Options of sbatch that are given otherwise, and how.
_OWN_OPTIONS = {
    **{
        name: f"use --{name}"
        for name in (
            *("account", "cpus-per-task", "gpus-per-node", "job-name", "nodes", "no-requeue", "partition", "qos"),
            *("requeue", "time"),
        )
    },
    **dict.fromkeys(("gpus", "gpus-per-task"), "use --gpus-per-node"),
    "mem-per-cpu": "use --mem-per-cpu-gb",
    "output": "use --output-dir",
    "signal": "use --signal-seconds",
    "open-mode": "a job that is queued again goes on in the same log",
    "chdir": "run this command in that directory, from which the config's paths count",
    "parsable": "the job's number is read anyway",
    "wrap": "the script is written by this command",
    "array": "one run is one job",
}
#: The forms in which SLURM takes a time: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmOptions:
    """Options of a SLURM job, by sbatch's names where it has them."""

    partition: str | None = None
    """None leaves it to the cluster."""

    nodes: int = 1
    """Nodes; each runs one launcher."""

    gpus_per_node: int = 0
    """GPUs of each node; 0 asks for none."""

    processes: int | None = None
    """Processes per node; None for one per GPU, or one where there are none."""

    cpus_per_task: int | None = None
    """CPUs of each node for all its processes; None leaves it to the cluster."""

    mem_per_cpu_gb: int | None = None
    """Gigabytes; None leaves it to the cluster."""

    time: str = "24:00:00"
    """Limit of one run of the job; a requeued job has it again."""

    account: str | None = None
    """Account to charge; None for the user's own."""

    qos: str | None = None
    """Quality of service; None for the user's own."""

    job_name: str = "blt-train"
    """Shown in the queue."""

    output_dir: Path | None = None
    """Folder of the log; None for the run directory's."""

    requeue: bool = True
    """Queue the job again at its time limit, when it is pre-empted, and when a node fails."""

    signal_seconds: int = 120
    """Seconds before the time limit at which training writes a checkpoint and the job is queued again."""

    max_restarts: int = 3
    """How often a failed process is answered by a restart within the job."""

    venv: Path | None = None
    """Virtual environment to activate; None puts the folder of this Python first in PATH."""

    env_command: str | None = None
    """Shell command that makes the environment, instead."""

    sbatch: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch, without their dashes; an empty value gives the option alone."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: a value is out of range, the signal would come before training can begin, or a further option
                is one that the script sets.
        """
        self._check_texts()
        for name, value, least in (
            ("nodes", self.nodes, 1),
            ("gpus-per-node", self.gpus_per_node, 0),
            ("nproc-per-node", self.processes, 1),
            ("cpus-per-task", self.cpus_per_task, 1),
            ("mem-per-cpu-gb", self.mem_per_cpu_gb, 1),
            ("signal-seconds", self.signal_seconds, 1),
            ("max-restarts", self.max_restarts, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{name} must be at least {least}, not {value}")
        limit = seconds_of(self.time)
        # SLURM sends the signal up to a minute early; a job that is queued again before its first step never ends.
        if limit is not None and limit < 2 * self.signal_seconds:
            raise ConfigError(
                f"--time {self.time} leaves no time to train when the checkpoint is written {self.signal_seconds} "
                "seconds before its end: give more time, or fewer --signal-seconds"
            )

    def _check_texts(self) -> None:
        """Check what is written into the script's head, where a line's end would end an option."""
        for name, setting in self.sbatch.items():
            if re.fullmatch("[a-z][a-z0-9-]*", name) is None:
                raise ConfigError(f"--sbatch {name!r} is no option of sbatch, such as constraint=h100 or exclusive")
            mend = _OWN_OPTIONS.get(name)
            if name.startswith("ntasks"):
                mend = "each node runs one launcher; use --nproc-per-node for its processes"
            elif name == "gres" and setting.startswith("gpu"):
                mend = "use --gpus-per-node"
            if mend is not None:
                raise ConfigError(f"--sbatch {name} is refused: {mend}")
        own = {"partition": self.partition, "account": self.account, "qos": self.qos, "job-name": self.job_name}
        given = {**own, "output-dir": str(self.output_dir or "")}
        given |= {f"sbatch {name}": setting for name, setting in self.sbatch.items()}
        for name, text in given.items():
            if text is not None and not text.isprintable():
                raise ConfigError(f"--{name} must be one line of printable characters, not {text!r}")

    @property
    def processes_per_node(self) -> int:
        """Processes that each node's launcher starts."""
        return self.processes if self.processes is not None else max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.processes_per_node


def seconds_of(text: str) -> int | None:
    """Return a time limit in seconds; None where it is unlimited.

    Args:
        text: as sbatch takes it, such as `30` (minutes), `24:00:00` or `2-12`.

    Raises:
        ConfigError: sbatch would not take it.
    """
    if text.upper() in ("INFINITE", "UNLIMITED"):
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"--time {text!r} is no time for SLURM; write minutes, H:M:S or D-H:M:S, such as 24:00:00")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, seconds = (0, *parts)[-3:]
    return (hours * 60 + minutes) * 60 + seconds


def submit(script: str, folder: Path) -> tuple[str, Path]:
    """Write a batch script and submit it.

    Args:
        script: its text.
        folder: where it is kept; made if need be.

    Returns:
        The job's number and the script's path.

    Raises:
        TrainingError: SLURM is not there, or refused the job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SCRIPT_NAME
    replace_text(path, script)
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise TrainingError(
            f"there is no sbatch here; submit {path} on a machine of the SLURM cluster, or use --dry-run to see it"
        ) from error
    if done.returncode != 0:
        told = " ".join(done.stderr.split()).removeprefix("sbatch: error: ")
        raise TrainingError(
            f"sbatch refused the job ({told or f'status {done.returncode}'}); check the partition, time, account and "
            f"qos, or mend {path} and submit it by hand"
        )
    return done.stdout.strip().split(";")[0], path
