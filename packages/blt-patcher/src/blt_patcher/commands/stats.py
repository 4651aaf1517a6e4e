"""`blt-patch stats`: how long the patches of a directory are."""

from __future__ import annotations

import json
from pathlib import Path

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import friendly_errors, print_table, progress
from blt_patcher.commands.results import warn_of_drift
from blt_patcher.drift import target_patch_length
from blt_patcher.stats import QUANTILES, collect_stats, draw_histogram, provenance_rows


@click.command("stats", epilog="Example: blt-patch stats data/patched")
@click.argument("patched_shards", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table and a histogram.")
@friendly_errors
def stats_command(patched_shards: Path, as_json: bool) -> None:
    """Tell how long the patches in DIR are: mean, quantiles, histogram. Lengths are in framed tokens.

    Checksums are verified, and a warning tells if the mean is far from the one the threshold was calibrated for.
    """
    directory = ShardDirectory.open(patched_shards, kind=ShardKind.PATCHED)
    with progress("counting", directory.manifest.bytes, "B") as bar:
        stats = collect_stats(directory, advance=bar.advance)
    if as_json:
        click.echo(json.dumps({**stats.to_json(), "target": target_patch_length(directory.manifest)}, indent=1))
        warn_of_drift(directory.manifest)
        return
    rows: dict[str, object] = {
        "documents": stats.documents,
        "bytes": stats.bytes,
        "patches": stats.patches,
        "mean patch length": f"{stats.mean:.4f}",
        **{f"{100 * share:g}% are at most": stats.quantile(share) for share in QUANTILES},
        "longest": stats.quantile(1.0),
        **provenance_rows(directory.manifest),
    }
    print_table(f"patch lengths of {patched_shards}", rows)
    click.echo("\nlength    share of patches")
    click.echo(draw_histogram(stats))
    warn_of_drift(directory.manifest)
