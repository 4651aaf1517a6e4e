"""The `blt-train report` command."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from blt_data.console import format_bytes, friendly_errors


@click.command("report", epilog="Example: blt-train report runs/muon runs/adamw --output report.html --open")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("report.html"), show_default=True,
    help="The page to write.",
)  # fmt: skip
@click.option("--title", help="Title of the page.")
@click.option("--open", "opens", is_flag=True, help="Show it in a browser.")
@friendly_errors
def report_command(runs: tuple[Path, ...], output: Path, title: str | None, opens: bool) -> None:
    """Write one HTML page that compares runs: curves, configs, final figures and samples.

    RUN is a run directory; it may be of a run that is going on, stopped or failed. One that
    cannot be read is left out with a warning.
    """
    from blt_train.report.comparison import write_comparison

    data = write_comparison(
        output, runs, title=title, warn=lambda sentence: click.echo(f"warning: {sentence}", err=True)
    )
    for run in data:
        for note in run.notes:
            click.echo(f"{run.path}: {note}", err=True)
    click.echo(f"{output}: {len(data)} run(s), {format_bytes(output.stat().st_size)}")
    if opens and not webbrowser.open(output.resolve().as_uri()):
        click.echo("no browser was found; open the file in one", err=True)
