"""Patch lengths by group of documents: by source, or by what an expression finds in their ids (a language, a site).

One mean over a mixed directory hides that a threshold cuts languages very differently. What compares across scripts is
characters per patch, since a character is one to four bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blt_data import Shard
from blt_data.framing import FRAME_TOKENS
from blt_data.shards.schema import DOCUMENT_ID, SOURCE

#: The group of documents whose id the expression does not match.
UNMATCHED: Final = "(no match)"


@dataclass(slots=True)
class GroupStats:
    """Counts over the documents of one group."""

    documents: int = 0
    bytes: int = 0
    """Raw content bytes."""
    characters: int = 0
    """Bytes that do not continue a UTF-8 character."""
    patches: int = 0

    @property
    def mean(self) -> float:
        """Mean patch length: framed tokens per patch."""
        return (self.bytes + FRAME_TOKENS * self.documents) / self.patches if self.patches else 0.0

    @property
    def bytes_per_character(self) -> float:
        """Mean bytes of a character; 0 where there is none."""
        return self.bytes / self.characters if self.characters else 0.0

    @property
    def characters_per_patch(self) -> float:
        """Characters for each patch that is not BOS alone; 0 where there is none."""
        own = self.patches - self.documents
        return self.characters / own if own else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the counts and what follows from them as JSON."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "characters": self.characters,
            "patches": self.patches,
            "mean_patch_length": self.mean,
            "bytes_per_character": self.bytes_per_character,
            "characters_per_patch": self.characters_per_patch,
        }


@dataclass(slots=True)
class GroupedStats:
    """Gathers counts shard by shard; hand `add` to `stats.collect_stats` as its `visit`."""

    group_of: Callable[[Shard], list[str]]
    """Names the group of every document of a shard, in order."""
    groups: dict[str, GroupStats] = field(default_factory=dict)

    def add(self, shard: Shard) -> None:
        """Count the documents of one patched shard."""
        offsets, content = shard.content_column()
        sizes, patches = np.diff(offsets), np.diff(shard.patch_column()[0])
        characters = _characters(content, offsets)
        names, places = np.unique(np.array(self.group_of(shard), dtype=object), return_inverse=True)
        columns = [np.bincount(places, values, names.size) for values in (sizes, characters, patches)]
        totals = zip(np.bincount(places, minlength=names.size), *columns, strict=True)
        for name, (documents, size, count, cut) in zip(names.tolist(), totals, strict=True):
            group = self.groups.setdefault(name, GroupStats())
            group.documents += int(documents)
            group.bytes += int(size)
            group.characters += int(count)
            group.patches += int(cut)

    def largest_first(self) -> list[tuple[str, GroupStats]]:
        """Return the groups, those of most bytes first."""
        return sorted(self.groups.items(), key=lambda item: (-item[1].bytes, item[0]))


def by_source(shard: Shard) -> list[str]:
    """Return the source of every document."""
    names: list[str] = shard.batch.column(SOURCE).to_pylist()
    return names


def by_id(expression: re.Pattern[str]) -> Callable[[Shard], list[str]]:
    """Return what names groups by an expression: its first group where it has one, else all that it matches.

    Args:
        expression: searched for in every document's id.
    """
    group = 1 if expression.groups else 0

    def name(document_id: str) -> str:
        match = expression.search(document_id)
        return UNMATCHED if match is None else match[group] or ""

    return lambda shard: [name(each) for each in shard.batch.column(DOCUMENT_ID).to_pylist()]


def _characters(content: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return int64 [D], the bytes of each document that do not continue a UTF-8 character (0x80 to 0xBF do)."""
    counts = np.zeros(offsets.size - 1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(offsets))
    if filled.size:
        begins = content[: int(offsets[-1])].view(np.int8) > -65
        counts[filled] = np.add.reduceat(begins, offsets[filled], dtype=np.int64)
    return counts
