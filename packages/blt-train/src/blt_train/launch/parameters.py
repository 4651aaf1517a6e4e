"""How command-line options of launching are read."""

from __future__ import annotations

import re
from typing import Any

import click

AUTO = "auto"


class ProcessCount(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click alone
    """A number of processes, or `auto`, which becomes None."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number."""
        if value == AUTO:
            return None
        try:
            return int(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a number nor {AUTO}", param, ctx)


class Setting(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click alone
    """NAME=VALUE, or NAME alone."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return name and value."""
        if isinstance(value, tuple):
            return value
        name, _, setting = str(value).partition("=")
        if not re.fullmatch("[a-z][a-z0-9-]*", name):
            self.fail(f"{value!r} is no NAME=VALUE without dashes, such as constraint=h100", param, ctx)
        return name, setting
