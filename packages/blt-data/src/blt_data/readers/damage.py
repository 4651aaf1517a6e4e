"""Files that are not what they should be."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from blt_data.errors import InputError
from blt_data.sources import SourceFile

#: What Arrow and its Python layer raise for bytes that are not what they should be. A damaged length may ask for more
#: memory than there is.
DAMAGE: Final = (pa.ArrowException, OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError)


def unreadable(file: SourceFile, what: str, error: Exception) -> Exception:
    """Return what to raise for an error met while reading: the error itself if it is the system's or ours.

    Args:
        file: the file being read.
        what: what it should be, such as `Parquet file`.
        error: what Arrow raised. Its own findings are OSErrors too, but without an error number.
    """
    if isinstance(error, InputError) or (isinstance(error, OSError) and type(error) is not OSError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return error
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return InputError(f"{file.location}: is a damaged or truncated {what} ({reason}); fetch or write it again")
