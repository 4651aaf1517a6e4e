"""The commands `blt-train export` and `blt-train import`."""

from __future__ import annotations

from pathlib import Path

import click

from blt_data.console import friendly_errors, print_table
from blt_data.units import NewDirectory

_ENTROPY_MODEL = click.option(
    "--entropy-model",
    type=click.Path(path_type=Path),
    help="The model that scored the training data, if it does not come with the model.",
)


@click.command("export", epilog="Example: blt-train export runs/blt --output exported --format transformers")
@click.argument("source")
@click.option("--output", required=True, type=NewDirectory(), help="Directory to make.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["native", "transformers"]),
    default="native",
    show_default=True,
    help="native: config, weights, patch scheme and entropy model; transformers: for BltForCausalLM.from_pretrained.",
)
@_ENTROPY_MODEL
@click.option("--ema", "averaged", is_flag=True, help="The moving average of the weights, if the run kept one.")
@friendly_errors
def export_command(source: str, output: Path, layout: str, entropy_model: Path | None, averaged: bool) -> None:
    """Write the model of SOURCE, a run or a checkpoint, to a directory that needs no run."""
    _exchange(source, output, layout, entropy_model, "exported", averaged=averaged)


@click.command("import", epilog="Example: blt-train import facebook/blt-1b --output models/blt-1b")
@click.argument("source")
@click.option("--output", required=True, type=NewDirectory(), help="Directory to make.")
@_ENTROPY_MODEL
@friendly_errors
def import_command(source: str, output: Path, entropy_model: Path | None) -> None:
    """Read foreign weights and write them in this project's format.

    SOURCE is a directory in transformers' Blt format or in the layout of the released weights, or a repository of the
    Hugging Face hub that holds one of them.
    """
    _exchange(source, output, "native", entropy_model, "imported")


def _exchange(
    source: str, output: Path, layout: str, entropy_model: Path | None, what: str, *, averaged: bool = False
) -> None:
    from blt_train.exchange import describe, export_model

    opened = export_model(source, output, format=layout, entropy_model=entropy_model, averaged=averaged)
    print_table(f"{what} {source} as {layout}: {output}", describe(opened))
