"""The `blt-train plan` and `blt-train configs` commands."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from blt_data.console import ByteSize, format_bytes, friendly_errors, print_table
from blt_train.config import GpuName
from blt_train.config_files import describe_packaged_configs
from blt_train.config_parsing import load_config
from blt_train.errors import ConfigError

if TYPE_CHECKING:
    from blt_train.planning.planner import RunPlan

#: Exit status of `plan` where the run does not fit, so that scripts can ask.
EXIT_DOES_NOT_FIT = 3


@click.command(
    "plan", epilog="Example: blt-train plan blt-1b-fineweb-edu-h100x64   or   blt-train plan mine.yaml --gpus 8 --json"
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpus", type=click.IntRange(min=1), help="Number of GPUs; plan.gpus of the config by default.")
@click.option(
    "--gpu", type=click.Choice([str(name) for name in GpuName]), help="Kind of GPU; plan.gpu of the config by default."
)
@click.option("--mfu", type=float, help="Model FLOP utilisation to reckon with; plan.mfu of the config by default.")
@click.option("--bytes", "total_bytes", type=ByteSize(), help="Train on so much text instead of schedule.total_steps.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@friendly_errors
def plan_command(
    config: str,
    overrides: tuple[str, ...],
    gpus: int | None,
    gpu: str | None,
    mfu: float | None,
    total_bytes: int | None,
    as_json: bool,
) -> None:
    """Say what training CONFIG takes: parameters, arithmetic, memory of a GPU, and time.

    Needs neither data nor a GPU; what it assumes instead (patch length, document length, utilisation) are the config's
    keys `plan.*`. Exits with status 3 if the run does not fit the GPU's memory, and says what to change.
    """
    from blt_train.planning.advice import changes_that_fit
    from blt_train.planning.planner import make_plan
    from blt_train.planning.tables import plan_to_json

    chosen = {"gpus": gpus, "gpu": gpu, "mfu": mfu}
    options = [f"plan.{name}={value}" for name, value in chosen.items() if value is not None]
    loaded = load_config(config, [*overrides, *options])
    plan = make_plan(loaded, total_bytes=total_bytes)
    changes = None if plan.fits else changes_that_fit(loaded)
    if as_json:
        click.echo(json.dumps(plan_to_json(plan, changes), indent=2))
    else:
        _print(loaded.model.preset, plan)
        if not plan.fits:
            click.echo(_advice(plan, changes))
    if not plan.fits:
        sys.exit(EXIT_DOES_NOT_FIT)


def _print(name: str, plan: RunPlan) -> None:
    from blt_train.planning.tables import arithmetic_rows, memory_rows, parameter_rows, summary_rows

    print_table(f"Parameters of {name}", parameter_rows(plan))
    print_table("Operations per byte", arithmetic_rows(plan), ("part", "forward", "training", "share"))
    title = f"Memory of one {plan.gpu.upper()}, highest at the end of the {plan.memory_phase} pass"
    if plan.memory_phase == "update":
        title = f"Memory of one {plan.gpu.upper()}, highest during the update"
    print_table(title, memory_rows(plan))
    print_table("Run", summary_rows(plan))


def _advice(plan: RunPlan, changes: list[str] | None) -> str:
    """Say by how much the run does not fit, and what to do."""
    over = f"does not fit: {format_bytes(plan.memory_bytes)} of {format_bytes(plan.memory_limit)} on each GPU"
    if changes is None:
        return f"{over}; no smaller micro batch, recomputation or number of GPUs helps: choose a smaller model"
    return f"{over}; fits with {' '.join(changes)}"


@click.command("configs", epilog="Example: blt-train configs 8b")
@click.argument("words", nargs=-1, metavar="[WORD]...")
@friendly_errors
def configs_command(words: tuple[str, ...]) -> None:
    """List the configs that come with the package, those whose names contain all WORDs in upper or lower case."""
    wanted = [word.lower() for word in words]
    packaged = describe_packaged_configs()
    rows = [(name, text) for name, text in packaged.items() if all(word in name.lower() for word in wanted)]
    if not rows:
        raise ConfigError(
            f"none of the {len(packaged)} packaged configs has {' and '.join(words)} in its name; `blt-train configs` "
            "alone lists them all"
        )
    print_table("Packaged configs", rows, ("name", "what"))
