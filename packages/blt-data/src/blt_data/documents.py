"""Documents in columns: what readers yield and writers take, with no Python object per document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

#: Content bytes up to which documents are put into one batch; a larger document has a batch of its own.
BATCH_BYTES: Final = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentBatch:
    """Consecutive documents of one file: n ≥ 1 of about `BATCH_BYTES` of content at most, or one larger document."""

    source: str
    """Name of the collection that the file belongs to."""
    file: str
    """Path of the file relative to what the user named, with '/' between its parts."""
    rows: npt.NDArray[np.int64]
    """int64 [n]: the row (or line) of each document in its file, counted from 1, increasing."""
    document_ids: pa.StringArray
    """string [n], no nulls; may be a slice, whose offsets do not begin at 0."""
    contents: pa.LargeBinaryArray
    """large_binary [n], no nulls, each valid UTF-8; may be a slice, whose offsets do not begin at 0."""

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.contents)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 [n + 1]: where each document begins in `data`, and where the last one ends."""
        _, offsets, _ = self.contents.buffers()
        first = self.contents.offset
        return np.frombuffer(offsets, np.int64)[first : first + len(self) + 1]

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """uint8 [m]: the buffer that `offsets` point into; document i is `data[offsets[i] : offsets[i + 1]]`."""
        buffer = self.contents.buffers()[2]
        return np.empty(0, np.uint8) if buffer is None else np.frombuffer(buffer, np.uint8)

    @property
    def content_bytes(self) -> int:
        """Bytes of all contents."""
        offsets = self.offsets
        return int(offsets[-1] - offsets[0])

    def slice(self, start: int, stop: int) -> DocumentBatch:
        """Return documents `start` to `stop` (excluded), sharing memory.

        Args:
            start: index of the first document.
            stop: one past the last.
        """
        return DocumentBatch(
            source=self.source,
            file=self.file,
            rows=self.rows[start:stop],
            document_ids=self.document_ids[start:stop],
            contents=self.contents[start:stop],
        )
