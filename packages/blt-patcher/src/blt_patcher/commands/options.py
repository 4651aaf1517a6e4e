"""Options that several subcommands of `blt-patch` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from blt_data.console import ByteSize
from blt_patcher.calibrate import DEFAULT_SAMPLE_BYTES

Command = TypeVar("Command", bound=Callable[..., Any])


def combine_options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return one decorator that adds several options, in the order given."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


scheme_options = combine_options(
    click.option("--threshold", type=float, metavar="T", help="θ in nats, of schemes entropy and entropy-combined."),
    click.option(
        "--relative-threshold",
        type=float,
        metavar="R",
        help="θ_r in nats, of schemes entropy-monotonic and entropy-combined.",
    ),
    click.option("--max-patch-length", type=int, metavar="M", help="Longest patch in tokens; longer ones are split."),
)
scoring_options = combine_options(
    click.option("--window-tokens", type=int, metavar="N", help="Tokens the entropy model sees at once."),
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N  [the GPU if there is one]."),
    click.option("--compile", "compile_model", is_flag=True, help="Compile the entropy model; pays off on a GPU."),
)
sample_option = click.option(
    "--sample-bytes",
    type=ByteSize(),
    default=DEFAULT_SAMPLE_BYTES,
    show_default=True,
    metavar="SIZE",
    help="Bytes to calibrate on: evenly spaced documents.",
)
