"""`blt-patch stats`: how long the patches of a directory are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from blt_data import ShardDirectory, ShardKind
from blt_data.console import friendly_errors, print_table, progress
from blt_data.errors import InputError
from blt_patcher import grouped_stats
from blt_patcher.commands.results import warn_of_drift
from blt_patcher.drift import target_patch_length
from blt_patcher.grouped_stats import GroupedStats
from blt_patcher.stats import QUANTILES, collect_stats, draw_histogram, provenance_rows
from blt_patcher.viewing import printable


@click.command(
    "stats",
    epilog="Example: blt-patch stats data/patched. By the language in ids such as fr/news/17: "
    "blt-patch stats data/patched --by-id '^([^/]+)/'",
)
@click.argument("patched_shards", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--by-source", is_flag=True, help="Also count each source by itself.")
@click.option(
    "--by-id", metavar="REGEX", help="Also count by what the first group of REGEX finds in the documents' ids."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table and a histogram.")
@friendly_errors
def stats_command(patched_shards: Path, by_source: bool, by_id: str | None, as_json: bool) -> None:
    """Tell how long the patches in DIR are: mean, quantiles, histogram. Lengths are in framed tokens.

    Checksums are verified, and a warning tells if the mean is far from the one the threshold was calibrated for.
    """
    grouped = _grouping(by_source, by_id)
    directory = ShardDirectory.open(patched_shards, kind=ShardKind.PATCHED)
    with progress("counting", directory.manifest.bytes, "B") as bar:
        stats = collect_stats(directory, visit=grouped.add if grouped else None, advance=bar.advance)
    if as_json:
        figures = {**stats.to_json(), "target": target_patch_length(directory.manifest)}
        if grouped is not None:
            figures["groups"] = {name: group.to_json() for name, group in grouped.largest_first()}
        click.echo(json.dumps(figures, indent=1, ensure_ascii=False))
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
    if grouped is not None:
        _print_groups(grouped, "source" if by_source else str(by_id))
    warn_of_drift(directory.manifest)


def _grouping(by_source: bool, by_id: str | None) -> GroupedStats | None:
    """Return what counts groups, if groups are asked for.

    Raises:
        InputError: both are asked for, or the expression is none.
    """
    if by_source and by_id is not None:
        raise InputError("--by-source and --by-id are two groupings; ask for one at a time")
    if by_source:
        return GroupedStats(grouped_stats.by_source)
    if by_id is None:
        return None
    try:
        return GroupedStats(grouped_stats.by_id(re.compile(by_id)))
    except re.error as error:
        raise InputError(f"--by-id {by_id!r} is no regular expression: {error}") from None


def _print_groups(grouped: GroupedStats, key: str) -> None:
    rows = [
        (
            printable(name),
            group.documents,
            group.bytes,
            group.patches,
            f"{group.mean:.3f}",
            f"{group.bytes_per_character:.3f}",
            f"{group.characters_per_patch:.3f}",
        )
        for name, group in grouped.largest_first()
    ]
    header = ("group", "documents", "bytes", "patches", "mean patch length", "bytes/character", "characters/patch")
    click.echo()
    print_table(f"by {key}", rows, header=header)
