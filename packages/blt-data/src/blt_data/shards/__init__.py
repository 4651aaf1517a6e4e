"""Shards: the schema, the atomic writer, the manifest, the memory-mapped reader, verification."""

from blt_data.shards.directory import ShardDirectory, ShardProgress, shard_directories, verify_directory
from blt_data.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest, write_manifest
from blt_data.shards.reader import Shard, entry_of_finished_shard
from blt_data.shards.schema import JSON, ShardKind, payload_sha256
from blt_data.shards.writer import write_shard

__all__ = [
    "JSON",
    "MANIFEST_NAME",
    "Manifest",
    "Shard",
    "ShardDirectory",
    "ShardEntry",
    "ShardKind",
    "ShardProgress",
    "entry_of_finished_shard",
    "payload_sha256",
    "read_manifest",
    "shard_directories",
    "verify_directory",
    "write_manifest",
    "write_shard",
]
