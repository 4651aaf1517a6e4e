"""Files that are one document as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from blt_data.documents import DocumentBatch
from blt_data.errors import InputError
from blt_data.readers.context import Context
from blt_data.readers.reasons import NO_UTF8
from blt_data.readers.streams import chunks_of
from blt_data.sample import UNDECODABLE, decode_python


def read_text(context: Context) -> Iterator[DocumentBatch]:
    """Yield a file of UTF-8 as one document, named after the file.

    Args:
        context: the unit.

    Raises:
        InputError: the file is no UTF-8 or damaged, and that is to fail.
        OSError: the file cannot be read.
    """
    data = b"".join(chunks_of(context))
    try:
        data.decode()
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        sentence = InputError(
            f"{context.file.location}: line {row} is no UTF-8 (byte {error.start + 1} of the file); "
            "convert the file with iconv"
        )
        context.policy.bad(sentence, NO_UTF8, len(data))
        return
    yield from _whole_file(context, data)


def read_python(context: Context) -> Iterator[DocumentBatch]:
    """Yield a file of Python source as one document; one that cannot be decoded is always counted and left out.

    Args:
        context: the unit.

    Raises:
        OSError: the file cannot be read.
    """
    data = b"".join(chunks_of(context))
    text = decode_python(data)
    if text is None:
        context.policy.skips.add(UNDECODABLE, bytes=len(data))
    else:
        yield from _whole_file(context, text.encode())


def _whole_file(context: Context, data: bytes) -> Iterator[DocumentBatch]:
    names = pa.array([context.file.relative], pa.string())
    return context.batches(np.ones(1, np.int64), names, pa.array([data], pa.large_binary()))
