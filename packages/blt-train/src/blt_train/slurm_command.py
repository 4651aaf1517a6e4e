"""The `blt-train slurm` command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from blt_data.console import friendly_errors, print_table
from blt_train.config_parsing import load_config
from blt_train.launch.parameters import Setting
from blt_train.launch.slurm import FOLDER_NAME, SCRIPT_NAME, SlurmOptions, submit
from blt_train.launch.slurm_script import batch_script


@click.command(
    "slurm",
    epilog="Example: blt-train slurm mine.yaml run=/shared/runs/1 --nodes 4 --gpus-per-node 8 --cpus-per-task 96 "
    "--partition h100 --time 24:00:00",
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", default=1, show_default=True, help="Nodes; each runs one launcher.")
@click.option("--gpus-per-node", default=0, show_default=True, help="GPUs of each node.")
@click.option("--nproc-per-node", "processes", type=int, help="Processes per node.  [default: one per GPU]")
@click.option("--partition", help="Partition of the job.")
@click.option("--account", help="Account to charge.")
@click.option("--qos", help="Quality of service.")
@click.option("--time", default="24:00:00", show_default=True, help="Time limit; a requeued job has it again.")
@click.option("--cpus-per-task", type=int, help="CPUs of each node, for all its processes.")
@click.option("--mem-per-cpu-gb", type=int, help="Gigabytes per CPU.")
@click.option("--job-name", default="blt-train", show_default=True, help="Name in the queue.")
@click.option("--output-dir", type=click.Path(path_type=Path), help="Folder of the log.  [default: RUN/slurm]")
@click.option(
    "--requeue/--no-requeue",
    default=True,
    show_default=True,
    help="Queue the job again at its time limit, and when it is pre-empted or a node fails.",
)
@click.option(
    "--signal-seconds",
    default=120,
    show_default=True,
    help="Seconds before the time limit at which a checkpoint is written.",
)
@click.option(
    "--max-restarts", default=3, show_default=True, help="Times to go on from the latest checkpoint within the job."
)
@click.option(
    "--venv", type=click.Path(path_type=Path), help="Virtual environment of the job.  [default: this command's Python]"
)
@click.option("--env-command", help="Shell command that makes the job's environment, instead.")
@click.option(
    "--sbatch", type=Setting(), multiple=True, help="A further option of sbatch, as NAME=VALUE; may be repeated."
)
@click.option("--dry-run", is_flag=True, help="Print the batch script; write and submit nothing.")
@friendly_errors
def slurm_command(
    config: str, overrides: tuple[str, ...], sbatch: tuple[tuple[str, str], ...], dry_run: bool, **values: Any
) -> None:
    """Train the model of CONFIG as a SLURM job: write its batch script into the run directory, and submit it.

    The job goes on from the run's latest checkpoint, also when it is queued again at its time limit or after a
    pre-emption. CONFIG and KEY=VALUE are those of `blt-train launch`; the run directory and the data must lie where all
    nodes see them.
    """
    options = SlurmOptions(sbatch=dict(sbatch), **values)
    loaded = load_config(config, overrides)
    from blt_train.inputs import check_launch

    check_launch(loaded, options.world_size)
    run = Path(loaded.run).absolute()
    script = run / FOLDER_NAME / SCRIPT_NAME
    text = batch_script(options, config=config, overrides=overrides, run=run, directory=Path.cwd(), script=script)
    if dry_run:
        click.echo(text, nl=False)
        return
    logs = (options.output_dir or run / FOLDER_NAME).absolute()
    logs.mkdir(parents=True, exist_ok=True)
    job, path = submit(text, script.parent)
    print_table("submitted", {"job": job, "script": path, "log": logs / f"{job}.out"})
    click.echo(f"squeue -j {job} shows where it stands, tail -F {logs / f'{job}.out'} what it does.", err=True)
