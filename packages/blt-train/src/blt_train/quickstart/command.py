"""The `blt-train quickstart` command."""

from __future__ import annotations

from pathlib import Path

import click

from blt_data.console import ByteSize, friendly_errors


@click.command(
    "quickstart",
    epilog="Example: blt-train quickstart --source 'texts/*.parquet' --output runs/mine",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/quickstart"),
    show_default=True,
    help="Directory of everything that is made.",
)
@click.option(
    "--source",
    default="python-stdlib",
    show_default=True,
    help="Corpus: a Parquet, JSON lines or text file, a directory, a glob, or this Python's own standard library.",
)
@click.option(
    "--limit-bytes", type=ByteSize(), default="3MB", show_default=True, help="Corpus size at most, such as 20MB."
)
@click.option("--holdout-fraction", default=0.05, show_default=True, help="Share of the documents to evaluate on.")
@click.option("--target-patch-length", default=4.5, show_default=True, help="Mean patch length to calibrate for.")
@click.option("--entropy-steps", default=300, show_default=True, help="Training steps of the entropy LM.")
@click.option("--blt-steps", default=400, show_default=True, help="Training steps of the BLT.")
@click.option("--prompt", default="def read_", show_default=True, help="What the sample text begins with.")
@click.option(
    "--baselines", is_flag=True, help="Also train a byte-level and a static-patch model for the same operations."
)
@friendly_errors
def quickstart_command(
    output: Path,
    source: str,
    limit_bytes: int,
    holdout_fraction: float,
    target_patch_length: float,
    entropy_steps: int,
    blt_steps: int,
    prompt: str,
    baselines: bool,
) -> None:
    """Go from raw text to a trained BLT and a report, in minutes on two CPU cores.

    Prepares a corpus, trains a small entropy LM, calibrates the threshold, cuts the text into patches, trains a small
    BLT, measures bits per byte on held-out documents, generates text and writes report.html. Run again, it goes on
    where it was.
    """
    from blt_train.quickstart.pipeline import QuickstartOptions, run_quickstart

    run_quickstart(
        QuickstartOptions(
            output=output,
            source=source,
            limit_bytes=limit_bytes,
            holdout_fraction=holdout_fraction,
            target_patch_length=target_patch_length,
            entropy_steps=entropy_steps,
            blt_steps=blt_steps,
            prompt=prompt,
            baselines=baselines,
        )
    )
