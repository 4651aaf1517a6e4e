"""Recipes: several sources, and how much of each, in one YAML file.

    seed: 0                     # of the shuffle
    limit_bytes: 10GB           # of all together
    sources:
      - source: fineweb-edu/sample-10BT
        revision: main
        weight: 3               # three quarters of limit_bytes
      - source: s3://bucket/books/*.jsonl.zst
        name: books
        text_column: body
        weight: 1

Paths are those that `--source` takes, and relative to where the command runs. A plain `--source` is a recipe of one.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import click

from blt_data.errors import InputError
from blt_data.sources import Format
from blt_data.units import ByteSize

_EXAMPLE: Final = "write a list `sources:` of entries such as `- source: fineweb-edu/sample-10BT`"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """One source of a recipe."""

    source: str
    """What `resolve_source` takes."""
    name: str | None = None
    """The `source` of its documents; None takes the collection's, file's or directory's name."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the hub."""
    text_column: str = "text"
    """Column or key that holds the text."""
    id_column: str | None = None
    """Column or key that holds the id; None takes where the collection is known to keep it, or `id`."""
    weight: float | None = None
    """Share of the recipe's `limit_bytes`, relative to the other sources' weights."""
    limit_bytes: int | None = None
    """Take the first documents of this source up to this many bytes."""
    format: Format | None = None
    """Format of all files, or None to go by their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Sources, in the order in which they are read."""

    sources: tuple[SourceSpec, ...]
    seed: int | None = None
    """Seed of the shuffle, if the recipe says one."""
    limit_bytes: int | None = None
    """Bytes of all documents together: with weights divided among the sources, else taken in their order."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError(f"the recipe has no sources; {_EXAMPLE}")
        weighted = [spec for spec in self.sources if spec.weight is not None]
        if weighted and self.limit_bytes is None:
            raise InputError(
                "the recipe has weights but no limit_bytes, of which they would be shares; add limit_bytes: 10GB, say, "
                "or give each source a limit_bytes of its own"
            )
        if weighted and len(weighted) < len(self.sources):
            without = next(spec.source for spec in self.sources if spec.weight is None)
            raise InputError(f"the recipe gives {without} no weight but others one; give each source a weight, or none")
        names = Counter(spec.name for spec in self.sources if spec.name is not None)
        check_names(names)

    @property
    def undivided_bytes(self) -> int | None:
        """The limit of all sources together, or None where there is none, or where the shares add up to it."""
        return None if any(spec.weight is not None for spec in self.sources) else self.limit_bytes

    def shares(self) -> tuple[int | None, ...]:
        """Return the most bytes that each source may give, or None where it may give all it has.

        A source that is smaller than its share gives what it has; nothing is repeated to make up for it.
        """
        total = sum(spec.weight or 0 for spec in self.sources)
        shares = []
        for spec in self.sources:
            caps = [] if spec.limit_bytes is None else [spec.limit_bytes]
            if spec.weight is not None and self.limit_bytes is not None:
                caps.append(max(1, math.floor(self.limit_bytes * (spec.weight / total))))
            shares.append(min(caps) if caps else None)
        return tuple(shares)


def check_names(names: Counter[str]) -> None:
    """Refuse two sources of one name: their documents could not be told apart.

    Args:
        names: each name and how often it is used.

    Raises:
        InputError: a name is used twice.
    """
    for name, count in names.items():
        if count > 1:
            raise InputError(f"{count} sources of the recipe are called {name!r}; give each a `name` of its own")


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.

    Raises:
        InputError: it is no YAML, or has an unknown key or an unusable value.
        OSError: it cannot be read.
    """
    # Reading shards needs no YAML, so that the package works without.
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_bytes())
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}{where}: is no YAML ({problem}); mend it") from error
    try:
        return _recipe(value)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _recipe(value: object) -> Recipe:
    table = _table(value, "the recipe", [field.name for field in fields(Recipe)])
    sources = table.get("sources")
    if not isinstance(sources, list) or not sources:
        raise InputError(f"the recipe has no list of sources; {_EXAMPLE}")
    seed = table.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
        raise InputError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed!r}")
    return Recipe(
        sources=tuple(_source(entry, f"source {index}") for index, entry in enumerate(sources, start=1)),
        seed=seed,
        limit_bytes=_size(table, "limit_bytes", "the recipe"),
    )


def _source(value: object, what: str) -> SourceSpec:
    if isinstance(value, str):
        value = {"source": value}
    table = _table(value, what, [field.name for field in fields(SourceSpec)])
    if not table.get("source"):
        raise InputError(f"{what} does not say which; {_EXAMPLE}")
    return SourceSpec(
        source=_text(table, "source", what) or "",
        name=_text(table, "name", what),
        revision=_text(table, "revision", what),
        text_column=_text(table, "text_column", what) or "text",
        id_column=_text(table, "id_column", what),
        weight=_weight(table, what),
        limit_bytes=_size(table, "limit_bytes", what),
        format=_format(table, what),
    )


def _table(value: object, what: str, known: list[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a mapping of {', '.join(known)}; {_EXAMPLE}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{what} has an unknown key {key!r}; {hint}")
    return value


def _text(table: Mapping[str, Any], key: str, what: str) -> str | None:
    value = table.get(key)
    if value is None:
        return None
    # YAML takes an unquoted revision such as 1234567 or 2024-10-01 for a number or a date.
    if not isinstance(value, str) or not value:
        raise InputError(f"{what}: {key} must be a text, not {value!r}; put it in quotes")
    return value


def _weight(table: Mapping[str, Any], what: str) -> float | None:
    value = table.get("weight")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"{what}: weight must be a number above 0, not {value!r}; leave out a source without weight")
    return float(value)


def _size(table: Mapping[str, Any], key: str, what: str) -> int | None:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError(f"{what}: {key} must be a number of bytes such as 10GB, not {value!r}")
    try:
        return ByteSize().convert(str(value), None, None)
    except click.BadParameter as error:
        raise InputError(f"{what}: {key}: {error.message}") from None


def _format(table: Mapping[str, Any], what: str) -> Format | None:
    value = _text(table, "format", what)
    if value is None:
        return None
    try:
        return Format(value)
    except ValueError:
        raise InputError(f"{what}: format must be one of {', '.join(Format)}, not {value!r}") from None
