"""Where documents come from: files on this machine, datasets on the hub, and whatever fsspec can reach.

`resolve_source` turns what the user names into an ordered list of `SourceFile`s, once per job; `open_file` opens one of
them, in any process and on any machine that reaches it.
"""

from blt_data.sources.files import UNRECOGNISED, Compression, Format, Source, SourceFile
from blt_data.sources.names import COLLECTIONS
from blt_data.sources.opening import open_file
from blt_data.sources.resolving import resolve_source

__all__ = [
    "COLLECTIONS",
    "UNRECOGNISED",
    "Compression",
    "Format",
    "Source",
    "SourceFile",
    "open_file",
    "resolve_source",
]
