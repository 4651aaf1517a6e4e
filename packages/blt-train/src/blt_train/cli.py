"""The `blt-train` command.

What needs torch is imported by the command that needs it, so that `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blt_data.console import ByteSize, format_bytes, friendly_errors, print_table, progress, sentence_of
from blt_train.config import Precision, TrainConfig
from blt_train.config_parsing import load_config
from blt_train.display import TrainingDisplay, tell_skipped
from blt_train.errors import EXIT_REQUEUE, ConfigError
from blt_train.exchange_commands import export_command, import_command
from blt_train.generate_command import generate_command
from blt_train.hangup import stop_at_once
from blt_train.launch.options import (
    DEFAULT_GRACE_SECONDS,
    DEFAULT_JOB_ID,
    DEFAULT_JOIN_SECONDS,
    Endpoint,
    LaunchOptions,
    torchrun_command,
)
from blt_train.launch.parameters import ProcessCount
from blt_train.launch.rank import is_rank, is_restarted, run_as_rank
from blt_train.planning.command import configs_command, plan_command
from blt_train.quickstart.command import quickstart_command
from blt_train.report_command import report_command
from blt_train.slurm_command import slurm_command

if TYPE_CHECKING:
    from blt_train.trainer import TrainResult


@click.group()
def main() -> None:
    """Train, evaluate and run Byte Latent Transformers and their entropy models."""


@main.command(
    "launch",
    epilog="Example: blt-train launch quickstart-entropy run=runs/mine schedule.total_steps=500   "
    "On two nodes: blt-train launch mine.yaml --nproc-per-node 8 --nnodes 2 --node-rank 0 --rdzv-endpoint node-1:29400",
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--nproc-per-node",
    "processes",
    type=ProcessCount(),
    default="1",
    show_default=True,
    help="Processes on this node, one per device; auto for one per GPU.",
)
@click.option("--nnodes", "nodes", default=1, show_default=True, help="Nodes; run the command on each of them.")
@click.option("--node-rank", type=int, help="Number of this node, from 0; needed with --nnodes.")
@click.option("--rdzv-endpoint", "endpoint", metavar="HOST:PORT", help="The first node, with a free port there.")
@click.option("--rdzv-id", "job_id", default=DEFAULT_JOB_ID, show_default=True, help="Name of the job on all nodes.")
@click.option(
    "--max-restarts", default=0, show_default=True, help="Times to go on from the latest checkpoint after a failure."
)
@click.option(
    "--grace-seconds",
    default=DEFAULT_GRACE_SECONDS,
    show_default=True,
    help="Time for a checkpoint after SIGTERM or SIGUSR1, before processes are killed.",
)
@click.option(
    "--join-seconds", default=DEFAULT_JOIN_SECONDS, show_default=True, help="Time for all nodes to come together."
)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on from the run's latest checkpoint.")
@friendly_errors
def launch_command(
    config: str,
    overrides: tuple[str, ...],
    processes: int | None,
    nodes: int,
    node_rank: int | None,
    endpoint: str | None,
    resume: bool,
    **limits: Any,
) -> None:
    """Train the model of CONFIG, a YAML file or the name of a packaged config.

    Config fields are set by KEY=VALUE with dotted keys, such as `data.train=DIR schedule.total_steps=500`. A second
    launch goes on from the latest checkpoint of the run directory. SIGTERM or a hang-up writes a checkpoint and exits
    with status 143, SIGUSR1 with status 75.
    """
    # Read by torch when it is loaded: what its C++ parts warn of is told in one sentence here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if is_rank():
        run_as_rank(lambda: _train(load_config(config, overrides), resume or is_restarted()))
        return
    if nodes > 1 and node_rank is None:
        raise ConfigError(f"--nnodes {nodes} needs --node-rank: 0 on the node of --rdzv-endpoint, then 1 and so on")
    options = LaunchOptions(
        processes=1 if processes is None else processes,
        nodes=nodes,
        node_rank=node_rank or 0,
        endpoint=Endpoint.parse(endpoint) if endpoint is not None else None,
        **limits,
    )
    # Loading torch takes seconds; the trainer and the launcher of several processes handle signals themselves later.
    with stop_at_once():
        _launch(config, overrides, options, resume=resume, is_counted=processes is None)


def _launch(config: str, overrides: tuple[str, ...], options: LaunchOptions, *, resume: bool, is_counted: bool) -> None:
    """Train in this process, or have this node's processes do it."""
    try:
        loaded = load_config(config, overrides)
        options = _checked(loaded, options, is_counted=is_counted)
    except (ValueError, OSError) as error:
        if options.nodes > 1:
            from blt_train.launch.job import tell_refusal

            tell_refusal(options, sentence_of(error))
        raise
    if options.world_size == 1:
        _train(loaded, resume)
        return
    arguments = ["launch", config, *overrides, *([] if resume else ["--no-resume"])]
    click.echo(f"the same by hand: {torchrun_command(arguments, options)}", err=True)
    from blt_train.launch.job import launch_processes

    launch_processes(arguments, options, lambda sentence: click.echo(sentence, err=True))


def _checked(config: TrainConfig, options: LaunchOptions, *, is_counted: bool) -> LaunchOptions:
    """Check a config for a job, and return the job's options with the number of processes that this machine is for."""
    from blt_train.launch.job import check_processes, count_devices

    if is_counted:
        options = dataclasses.replace(options, processes=count_devices(config))
    check_processes(config, options)
    return options


def _train(config: TrainConfig, resume: bool) -> None:
    """Train in this process, showing progress, and print the summary on the first rank."""
    from blt_train.stopping import StoppedEarly
    from blt_train.trainer import train

    rank_is_shown = not is_rank() or _is_first_rank()
    try:
        if not rank_is_shown:
            result = train(config, resume=resume)
        else:
            with TrainingDisplay(f"training {config.run}", config.schedule.total_steps) as display:
                result = train(config, resume=resume, on_progress=display)
            _print_summary(result)
    except StoppedEarly as stopped:
        if rank_is_shown:
            _tell_stop(stopped.status, "before its first step")
        raise
    if result.exit_status:
        if rank_is_shown:
            _tell_stop(result.exit_status, f"after step {result.step}")
        sys.exit(result.exit_status)


def _tell_stop(status: int, when: str) -> None:
    name = "SIGUSR1" if status == EXIT_REQUEUE else "SIGTERM"
    click.echo(f"stopped by {name} {when}; run the same command again to go on", err=True)


def _is_first_rank() -> bool:
    return os.environ["RANK"] == "0"


def _print_summary(result: TrainResult) -> None:
    rows: dict[str, object] = {"checkpoint": result.checkpoint, "steps": result.step}
    if result.steps:
        last = result.steps[-1]
        rows["bytes seen"] = format_bytes(sum(metrics.bytes for metrics in result.steps))
        rows["epochs"] = f"{last.epoch:.2f}"
        rows["last batch, bits per byte"] = _finite(last.bpb)
        if last.nonfinite_steps:
            rows["left out"] = tell_skipped(last.nonfinite_steps)
        rows["speed"] = f"{format_bytes(result.bytes_per_second)}/s"
        if last.mean_patch_length is not None:
            rows["mean patch length"] = f"{last.mean_patch_length:.2f} tokens"
        mean_utilisation = sum(metrics.utilisation for metrics in result.steps) / len(result.steps)
        rows["utilisation"] = f"{100 * mean_utilisation:.1f}%"
        rows["peak memory"] = format_bytes(last.memory_bytes)
    if result.evaluations:
        first, newest = result.evaluations[0], result.evaluations[-1]
        rows[f"held-out bits per byte, step {first.step}"] = _finite(first.holdout_bpb)
        if newest is not first:
            rows[f"held-out bits per byte, step {newest.step}"] = _finite(newest.holdout_bpb)
    print_table("Training" if result.is_finished else "Training, stopped", rows)
    skipped = _last_skipped(result)
    if result.is_finished and skipped:
        which = "the last step was" if skipped == 1 else f"the last {skipped:,} steps were"
        click.echo(
            f"warning: {which} left out as not finite, so the weights are those of step {result.step - skipped:,}",
            err=True,
        )


def _last_skipped(result: TrainResult) -> int:
    """Return how many steps at the end of a run were left out as not finite."""
    counts = [0, *(metrics.nonfinite_steps for metrics in result.steps)]
    sound = (back for back in range(1, len(counts)) if counts[-back] == counts[-back - 1])
    return next(sound, len(counts)) - 1


def _finite(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


@main.command("evaluate", epilog="Example: blt-train evaluate --checkpoint runs/blt --data data/patches/holdout")
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="Run or model directory.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Shard directory of held-out documents.")
@click.option("--max-bytes", type=ByteSize(), help="Evaluate the first documents up to this many bytes.")
@click.option("--sequence-tokens", type=click.IntRange(min=2), help="Cut longer documents; as in training by default.")
@click.option("--precision", type=click.Choice([str(item) for item in Precision]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--ema", "averaged", is_flag=True, help="The moving average of the weights, if the run kept one.")
@friendly_errors
def evaluate_command(
    checkpoint: Path,
    data: Path,
    max_bytes: int | None,
    sequence_tokens: int | None,
    precision: str,
    device: str,
    averaged: bool,
) -> None:
    """Print bits per byte of a model on held-out documents."""
    from blt_train.evaluation import evaluate

    with progress("evaluating", unit="B") as bar:
        result = evaluate(
            checkpoint,
            data,
            max_bytes=max_bytes,
            sequence_tokens=sequence_tokens,
            precision=Precision(precision),
            device=device,
            averaged=averaged,
            progress=bar,
        )
    if not math.isfinite(result.bpb):
        click.echo(f"warning: {checkpoint}: the loss is not finite, though the weights are", err=True)
    print_table(
        "Evaluation",
        {
            "documents": result.documents,
            "bytes": result.bytes,
            "predictions (bytes and EOS)": result.targets,
            "nats per prediction": _finite(result.loss),
            "bits per byte": _finite(result.bpb),
        },
    )
    if result.by_source:
        print_table(
            "By source",
            [
                (name, tally.documents, tally.bytes, _finite(tally.bpb) if tally.bytes else "")
                for name, tally in result.by_source.items()
            ],
            ("source", "documents", "bytes", "bits per byte"),
        )


main.add_command(configs_command)
main.add_command(export_command)
main.add_command(generate_command)
main.add_command(import_command)
main.add_command(plan_command)
main.add_command(quickstart_command)
main.add_command(slurm_command)
main.add_command(report_command)
