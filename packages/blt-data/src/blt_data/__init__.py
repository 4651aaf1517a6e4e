"""Documents to Arrow byte shards for byte-level language models."""

from blt_data.errors import InputError
from blt_data.framing import frame, unframe

__all__ = ["InputError", "frame", "unframe"]
