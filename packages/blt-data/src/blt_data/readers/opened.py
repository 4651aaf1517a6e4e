"""Parquet files held open from one unit to the next, which is mostly of the same file."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

import pyarrow.parquet as pq

from blt_data.sources import SourceFile, open_file

#: Bytes of a local file that are read at once, so that a large row group is never in memory as a whole.
_BUFFER: Final = 4 << 20


class OpenParquet:
    """The Parquet file that was read last; a context manager that closes it in the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._file: SourceFile | None = None
        self._parquet: pq.ParquetFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, file: SourceFile) -> pq.ParquetFile:
        """Return a file, opening it unless it is the one that is open.

        Args:
            file: the file.

        Raises:
            pyarrow.ArrowException: it is no Parquet.
            OSError: it cannot be read.
        """
        if self._parquet is None or self._file != file:
            self.close()
            raw = self._stack.enter_context(open_file(file))
            # Column by column in small pieces would be one request after the other over a network.
            buffer = 0 if file.is_remote else _BUFFER
            # Few writers put checksums into pages; where there are some, damage does not get past them.
            self._parquet = self._stack.enter_context(
                pq.ParquetFile(raw, page_checksum_verification=True, pre_buffer=False, buffer_size=buffer)
            )
            self._file = file
        return self._parquet

    def close(self) -> None:
        """Close what is open."""
        self._file = self._parquet = None
        self._stack.close()
