"""Sizes, durations and directories as people write and read them."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import click

_UNITS: Final = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}

#: Sizes are int64 in files and in Arrow.
_MOST: Final = 2**63 - 1


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click alone
    """A number of bytes, such as 20000000, 20MB (decimal) or 16MiB (binary)."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(value).lower(), re.ASCII)
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is no number of bytes; write 20000000, 20MB or 16MiB", param, ctx)
        if len(match[1]) > 40 or (size := int(Decimal(match[1]) * _UNITS[match[2]])) > _MOST:
            self.fail(f"must be less than {2**63:,} bytes", param, ctx)
        if size < 1:
            self.fail("must be at least one byte", param, ctx)
        return size


class NewDirectory(click.Path):
    """A directory to write, as a `Path`; an empty text is refused, as it would mean the working directory."""

    name = "directory"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        # An unset variable of a shell must not turn into the working directory.
        if value == "":
            self.fail("is an empty text; name a directory", param, ctx)
        return super().convert(value, param, ctx)


def format_bytes(amount: float) -> str:
    """Return a number of bytes in decimal units, such as `18.1 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(amount) < 1000 or unit == "TB":
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable: the loop returns at TB")


def format_duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds, such as `0:03:12`, with days where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days:,} d ' if days else ''}{hours}:{minutes:02}:{rest:02}"
