"""What the subcommands that show patches ask of the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import click
from rich.console import Console

from blt_patcher.viewing import PatchView, render_patches
from blt_patcher.viewing.terminal import PALETTES, Band

ColorChoice = Literal["auto", "always", "never"]

color_option: Callable[[Any], Any] = click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Colour patches, or set │ between them; auto colours on a terminal unless NO_COLOR is set.",
)


class PatchPrinter:
    """Prints patches on standard output, in colour where that is wanted and can be."""

    def __init__(self, color: ColorChoice = "auto") -> None:
        """Look at the terminal and at `NO_COLOR`.

        Args:
            color: whether to colour; `auto` does on a terminal that can, unless `NO_COLOR` is set.
        """
        self.console = Console(highlight=False, markup=False, force_terminal=True if color == "always" else None)
        system = self.console.color_system
        if color == "always":
            # A pipe does not say what its end can show; nearly all terminals know 256 colours.
            self.console = Console(
                highlight=False,
                markup=False,
                force_terminal=True,
                color_system="256" if system is None else "auto",
                no_color=False,
            )
            system = self.console.color_system or "256"
        coloured = color == "always" or (
            color == "auto" and system is not None and self.console.is_terminal and not self.console.no_color
        )
        self.palette: tuple[Band, Band] | None = None
        if coloured:
            self.palette = PALETTES.get(str(system), PALETTES["standard"])

    def print(self, view: PatchView, prefix: str = "") -> None:
        """Print a document's patches.

        Args:
            view: the document.
            prefix: what every line begins with.
        """
        width = max(self.console.width - len(prefix), 10) if self.console.is_terminal else None
        for line in render_patches(view, palette=self.palette, width=width):
            self.console.print(prefix, line, sep="", soft_wrap=True)

    def print_lines(self, lines: Sequence[str]) -> None:
        """Print lines of text as they are."""
        for line in lines:
            self.console.print(line, soft_wrap=True)
