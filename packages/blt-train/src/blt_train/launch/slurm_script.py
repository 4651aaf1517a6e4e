"""The batch script of a training job."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from blt_train.errors import EXIT_REQUEUE
from blt_train.launch.slurm import SlurmOptions

_HEAD = """\
#!/bin/bash
# Trains {config} in {run}, on {nodes} node(s) with {processes} process(es) each.
# Written by `blt-train slurm`. To go on with the run after its job has ended: sbatch {script}
"""

_BODY = """\

# The environment of the job.
{environment}

# The launchers of all nodes meet on the first one, at a port of this job and under a name of this start of it: after a
# requeue, nothing that is left of the start before is met.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
endpoint=$first_node:$((15000 + SLURM_JOB_ID % 15000))
start=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}

# One launcher per node. When one ends, the others end by themselves and say why; SLURM need not kill them.
srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 {srun} --kill-on-bad-exit=0 --wait=0 \\
  bash -c 'exec blt-train launch "$@" --node-rank "$SLURM_NODEID"' launcher \\
  {arguments} \\
  --nnodes "$SLURM_NNODES" --nproc-per-node {processes} --max-restarts {max_restarts} \\
  --rdzv-endpoint "$endpoint" --rdzv-id "$start" &
step=$!

# SLURM warns this script alone. It passes the signal on: the launchers have their processes write a checkpoint.
signalled=
pass_on() {{
  signalled=yes
  scancel --signal="$1" "$SLURM_JOB_ID.0" 2>/dev/null
}}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# `wait` returns when a signal comes, too.
while :; do
  signalled=
  wait "$step"
  status=$?
  [[ -n $signalled ]] || break
done
"""

_REQUEUE = """\

# {requeue_status}: the checkpoint is written, and the time is nearly over. A pre-empted job SLURM requeues itself.
if [[ $status -eq {requeue_status} ]]; then
  echo "the checkpoint is written; job $SLURM_JOB_ID is queued again to go on from it"
  scontrol requeue "$SLURM_JOB_ID"
fi
"""

_NO_REQUEUE = """\

if [[ $status -eq {requeue_status} ]]; then
  echo "the checkpoint is written, and the time is nearly over; to go on from it: sbatch {script}"
fi
"""

_TAIL = """\
exit "$status"
"""


def batch_script(
    options: SlurmOptions, *, config: str, overrides: Sequence[str], run: Path, directory: Path, script: Path
) -> str:
    """Return the batch script that trains a run.

    Args:
        options: of the job.
        config: file or name of the config.
        overrides: `key=value`.
        run: directory of the run, absolute.
        directory: from which relative paths of the config count, absolute.
        script: where the script will be.
    """
    fields = {
        "config": config,
        "run": str(run),
        "nodes": options.nodes,
        "processes": options.processes_per_node,
        "max_restarts": options.max_restarts,
        "script": shlex.quote(str(script)),
        "environment": _environment_command(options),
        # Since SLURM 22.05 a step no longer inherits the CPUs of its job.
        "srun": f"--cpus-per-task={options.cpus_per_task}" if options.cpus_per_task is not None else "",
        "arguments": shlex.join([config, *overrides]),
        "requeue_status": EXIT_REQUEUE,
    }
    directives = _directives(options, run=run, directory=directory)
    parts = [_HEAD, "\n".join(directives) + "\n", _BODY, _REQUEUE if options.requeue else _NO_REQUEUE, _TAIL]
    head, requests, *rest = parts
    return head.format(**fields) + requests + "".join(part.format(**fields) for part in rest)


def _directives(options: SlurmOptions, *, run: Path, directory: Path) -> list[str]:
    """Return the lines by which sbatch is told what the job needs."""
    log = (options.output_dir or run / "slurm").absolute() / "%j.out"
    requested: list[tuple[str, object]] = [
        ("job-name", options.job_name),
        ("partition", options.partition),
        ("account", options.account),
        ("qos", options.qos),
        ("time", options.time),
        ("nodes", options.nodes),
        ("ntasks-per-node", 1),
        ("gpus-per-node", options.gpus_per_node or None),
        ("cpus-per-task", options.cpus_per_task),
        ("mem-per-cpu", f"{options.mem_per_cpu_gb}G" if options.mem_per_cpu_gb is not None else None),
        ("chdir", directory),
        ("output", str(log.parent).replace("%", "%%") + f"/{log.name}"),
    ]
    given = {name: value for name, value in requested if value is not None}
    lines = [_directive(name, str(value)) for name, value in given.items()]
    lines += [_directive(name, value) for name, value in options.sbatch.items()]
    requeue = "requeue" if options.requeue else "no-requeue"
    return [
        *lines,
        "# A requeued job goes on in the same log.",
        "#SBATCH --open-mode=append",
        f"#SBATCH --{requeue}",
        "# A warning to this script before the time limit; SLURM may give it a minute earlier.",
        f"#SBATCH --signal=B:USR1@{options.signal_seconds}",
    ]


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


def _environment_command(options: SlurmOptions) -> str:
    """Return the shell command that gives the job this command's Python, or the one that the user names."""
    if options.env_command is not None:
        return options.env_command
    if options.venv is not None:
        return f"source {shlex.quote(str(options.venv.absolute() / 'bin' / 'activate'))}"
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
