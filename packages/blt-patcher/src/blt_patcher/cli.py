"""The `blt-patch` command: the group; each subcommand has a module in `blt_patcher.commands`."""

from __future__ import annotations

import logging

import click

from blt_patcher.commands.calibrate import calibrate_command
from blt_patcher.commands.compare import compare_command
from blt_patcher.commands.precompute import precompute_command
from blt_patcher.commands.repatch import repatch_command
from blt_patcher.commands.show import show_command
from blt_patcher.commands.stats import stats_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="blt-patcher")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done.")
def main(verbose: bool) -> None:
    """Cut documents into patches for byte-level language models."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")


for _command in (
    calibrate_command,
    precompute_command,
    repatch_command,
    stats_command,
    show_command,
    compare_command,
):
    main.add_command(_command)

if __name__ == "__main__":
    main()
