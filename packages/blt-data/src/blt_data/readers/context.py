"""What every reader is given, and what it makes batches with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt_data.documents import BATCH_BYTES, DocumentBatch
from blt_data.readers.opened import OpenParquet
from blt_data.reading import Reading, Unit
from blt_data.skips import ErrorPolicy
from blt_data.sources import SourceFile

#: Is told how many bytes of the source file have been read since the last call.
Advance: TypeAlias = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """One unit to read."""

    unit: Unit
    reading: Reading
    policy: ErrorPolicy
    advance: Advance
    opened: OpenParquet

    @property
    def file(self) -> SourceFile:
        """The unit's file."""
        return self.unit.file

    def batches(
        self, rows: npt.NDArray[np.int64], document_ids: pa.StringArray, contents: pa.LargeBinaryArray
    ) -> Iterator[DocumentBatch]:
        """Yield documents in batches of at most `BATCH_BYTES`, or of one document.

        Args:
            rows: int64 [n], counted from 1.
            document_ids: string [n], no nulls.
            contents: large_binary [n], no nulls.
        """
        whole = DocumentBatch(
            source=self.reading.source,
            file=self.file.relative,
            rows=rows,
            document_ids=document_ids,
            contents=contents,
        )
        offsets = whole.offsets
        start = 0
        while start < len(whole):
            stop = int(np.searchsorted(offsets, offsets[start] + BATCH_BYTES, side="right")) - 1
            stop = min(max(stop, start + 1), len(whole))
            yield whole if stop - start == len(whole) else whole.slice(start, stop)
            start = stop
