"""The command line `blt-data`: a group of the commands in `blt_data.commands`."""

from __future__ import annotations

import click

from blt_data.commands.inspect import inspect_command
from blt_data.commands.merge import merge_command
from blt_data.commands.prepare import prepare_command
from blt_data.commands.verify import verify_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="blt-data", prog_name="blt-data")
def main() -> None:
    """Turn documents into Arrow byte shards for byte-level language models."""


for _command in (prepare_command, verify_command, inspect_command, merge_command):
    main.add_command(_command)


if __name__ == "__main__":
    main()
