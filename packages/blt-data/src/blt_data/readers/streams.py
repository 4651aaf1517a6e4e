"""The bytes of a source file, decompressed, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pyarrow as pa

from blt_data.readers.context import Context
from blt_data.readers.damage import unreadable
from blt_data.sources import open_file

_CHUNK: Final = 4 << 20


def chunks_of(context: Context) -> Iterator[bytes]:
    """Yield a file's bytes, decompressed.

    Args:
        context: the unit, a whole file.

    Raises:
        InputError: the file is damaged.
        OSError: it cannot be read.
    """
    file = context.file
    with open_file(file) as raw:
        if file.compression is None:
            while chunk := raw.read(_CHUNK):
                yield chunk
                context.advance(len(chunk))
            return
        if not file.size:
            # Even nothing, compressed, is some bytes; Arrow takes no bytes for nothing.
            raise unreadable(file, f"{file.compression} file", pa.ArrowInvalid("it is empty"))
        told = 0
        try:
            # Arrow's stream, unlike Python's zstandard, knows a truncated file from a whole one.
            with pa.CompressedInputStream(raw, file.compression) as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
                    position = raw.tell()
                    context.advance(position - told)
                    told = position
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file, f"{file.compression} file", error) from error
