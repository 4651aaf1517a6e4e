"""Documents to Arrow byte shards for byte-level language models."""

from blt_data.errors import InputError
from blt_data.framing import frame, unframe
from blt_data.shards import (
    Manifest,
    Shard,
    ShardDirectory,
    ShardEntry,
    ShardKind,
    entry_of_finished_shard,
    read_manifest,
    verify_directory,
    write_manifest,
    write_shard,
)

__all__ = [
    "InputError",
    "Manifest",
    "Shard",
    "ShardDirectory",
    "ShardEntry",
    "ShardKind",
    "entry_of_finished_shard",
    "frame",
    "read_manifest",
    "unframe",
    "verify_directory",
    "write_manifest",
    "write_shard",
]
