"""What the user may say of a job; needs nothing but the light core."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from blt_data.errors import InputError
from blt_data.gather import Compression
from blt_data.skips import OnError

if TYPE_CHECKING:
    from blt_data.recipe import Recipe

#: Content bytes per shard unless told otherwise.
DEFAULT_SHARD_BYTES: Final = 64 << 20

#: Bytes that the documents of a foreign reader are supposed to have: only how cells are cut depends on it.
_UNKNOWN_BYTES: Final = 64 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What to prepare and where."""

    source: str | None = None
    """What `resolve_source` takes: a path, a glob, a name such as `fineweb-edu`, a URL, or `python-stdlib`."""
    recipe: Recipe | str | os.PathLike[str] | None = None
    """Several sources, or the YAML file that says them; instead of `source`."""
    output: str | os.PathLike[str]
    """Directory to make; it may hold an unfinished run."""
    revision: str | None = None
    """Branch, tag or commit of a source on the hub."""
    holdout_fraction: float | None = None
    """Share of documents, between 0 and 1, held out by a hash of their id; None holds out nothing."""
    limit_bytes: int | None = None
    """Take the first documents up to this many bytes, whole ones only."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    """Content bytes at which a shard is full; a larger document has its own."""
    shuffle_seed: int | None = 0
    """Seed of the order of the documents; None keeps that of the source."""
    deduplicate: bool = False
    """Whether of documents of equal content only the first is kept."""
    compression: Compression = "none"
    """Of the shards: `zstd` makes them smaller, but they are then decompressed into memory when opened."""
    on_error: OnError = OnError.FAIL
    """What becomes of a bad row or a damaged file."""
    text_column: str = "text"
    """Column or key that holds the text."""
    id_column: str | None = None
    """Column or key that holds the id, where it is missing, null or empty, `path#row` serves; None takes where the
    collection is known to keep it, or `id`."""
    source_name: str | None = None
    """The `source` of every document; None takes the name of the collection, file or directory."""
    workers: int | None = None
    """Tasks at once; they change nothing but the time. None takes as many as CPUs, fewer for little data or memory."""
    memory_limit: int | None = None
    """Bytes of memory of all local processes together, or of each worker elsewhere; None takes half the machine's."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.recipe is None):
            raise InputError("name either a source or a recipe")
        for name in _IN_RECIPE if self.recipe is not None else ():
            if getattr(self, name) != _DEFAULTS[name]:
                raise InputError(f"{name.replace('_', ' ')} is of one source; write {name} into the recipe")
        if self.holdout_fraction is not None and not 0 < self.holdout_fraction < 1:
            raise InputError(f"holdout fraction must be between 0 and 1, both excluded, not {self.holdout_fraction}")
        for name in ("limit_bytes", "shard_bytes", "workers", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
        if self.compression not in ("none", "zstd"):
            raise InputError(f"compression must be none or zstd, not {self.compression!r}")


#: What a recipe says of each of its sources.
_IN_RECIPE: Final = ("revision", "text_column", "id_column", "source_name")
_DEFAULTS: Final = {field.name: field.default for field in fields(PrepareConfig)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignReader:
    """datatrove blocks that give the documents in place of our reader."""

    blocks: tuple[Any, ...]
    tasks: int
    """Ranks that share the reading."""
    expected_bytes: int = _UNKNOWN_BYTES
    """Content of all documents, roughly."""
