"""What is read in one go, and under which names."""

from __future__ import annotations

from dataclasses import dataclass

from blt_data.shards.schema import JSON
from blt_data.sources import SourceFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the files of one source are read."""

    source: str
    """Name that every document of the source carries."""
    text_column: str = "text"
    """Column or key that holds the text; in JSON `a.b` is key b of the object under key a."""
    id_column: str = "id"
    """Column or key that holds the id, likewise; where it is missing, null or empty, `path#row` serves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Consecutive documents of one file that are read in one go."""

    file: SourceFile
    weight: int
    """Bytes to read, as near as the file tells without reading it."""
    row_groups: tuple[int, int] | None = None
    """First and one past the last row group of a Parquet file; None reads the whole file."""
    first_row: int = 0
    """Rows of the file before this unit."""
    ordinal: int = 0
    """Position among all units of the plan: documents in source order have increasing (ordinal, row)."""

    def identity(self) -> JSON:
        """Return what decides this unit's documents."""
        file = self.file
        return [str(file.format), file.relative, file.size, file.version, *(self.row_groups or ())]
