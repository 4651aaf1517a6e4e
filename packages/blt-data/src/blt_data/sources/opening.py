"""Opening a source file, wherever it lies."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

from blt_data.sources.files import SourceFile

if TYPE_CHECKING:
    from blt_data.sources.retrying import RetryingFile


def open_file(file: SourceFile) -> IO[bytes] | RetryingFile:
    """Open a file to read and seek in.

    Args:
        file: the file.

    Raises:
        InputError: it is remote, and gone or forbidden (when it is first read).
        OSError: it cannot be opened; `RemoteError` if a remote one cannot be read after several tries.
    """
    if not file.is_remote:
        return open(file.location, "rb")
    # The clients take a second to import, and most runs do not need both.
    if file.location.startswith("hf://"):
        from blt_data.sources.hub import open_hub_file

        return open_hub_file(file)
    from blt_data.sources.remote import open_remote_file

    return open_remote_file(file)
