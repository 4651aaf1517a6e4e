"""Documents to Arrow byte shards for byte-level language models."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from blt_data.building import build_pipeline

__all__ = [
    "InputError",
    "Manifest",
    "Shard",
    "ShardDirectory",
    "ShardEntry",
    "ShardKind",
    "build_pipeline",
    "entry_of_finished_shard",
    "frame",
    "read_manifest",
    "unframe",
    "verify_directory",
    "write_manifest",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    """Import what needs datatrove only when it is asked for, so that reading shards does without."""
    if name == "build_pipeline":
        from blt_data.building import build_pipeline

        return build_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
