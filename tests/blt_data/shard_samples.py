"""Shard directories to look into, verify and merge, made without preparing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from blt_data import Manifest, ShardKind, write_manifest, write_shard
from blt_data.shards import JSON
from blt_data.skips import Skips

Document = tuple[str, bytes, str]


def patch_columns(contents: Sequence[bytes]) -> tuple[pa.Array, pa.Array]:
    """Patches of BOS alone and then runs of at most 7 tokens; entropies that count up."""
    lengths = []
    for content in contents:
        rest = len(content) + 1
        lengths.append([1, *[7] * (rest // 7), *([rest % 7] if rest % 7 else [])])
    entropies = [np.arange(len(content) + 2, dtype=np.float16) for content in contents]
    return pa.array(lengths, pa.list_(pa.uint16())), pa.array(entropies, pa.list_(pa.float16()))


def make_directory(
    path: Path,
    shards: Sequence[Sequence[Document]],
    *,
    kind: ShardKind = ShardKind.BYTES,
    entropies: bool = False,
    provenance: Mapping[str, JSON] | None = None,
    skipped: Skips | None = None,
    compression: Literal["none", "zstd"] = "none",
) -> Manifest:
    """Write (id, content, source) of each shard to a directory, and its manifest."""
    path.mkdir(parents=True)
    stated: dict[str, JSON] = dict(
        provenance if provenance is not None else {"command": "test", "of": [1, {"two": None}]}
    )
    entries = []
    for index, documents in enumerate(shards):
        contents = [content for _, content, _ in documents]
        lengths, scores = patch_columns(contents)
        entries.append(
            write_shard(
                path / f"shard-{index:05d}.arrow",
                kind=kind,
                document_ids=[name for name, _, _ in documents],
                contents=contents,
                sources=[source for _, _, source in documents],
                patch_lengths=lengths if kind is ShardKind.PATCHED else None,
                entropies=scores if entropies else None,
                provenance=stated,
                compression=compression,
            )
        )
    manifest = Manifest(kind=kind, shards=tuple(entries), provenance=stated, skipped=skipped or Skips())
    write_manifest(path, manifest)
    return manifest


def some_documents(seed: int, count: int, *, source: str = "s", longest: int = 60) -> list[Document]:
    """Return documents of random lengths and text, of two sources."""
    random = np.random.default_rng(seed)
    texts = [random.bytes(int(random.integers(0, longest))).decode("latin-1") for _ in range(count)]
    return [(f"{source}-{seed}/{index}", text.encode(), f"{source}{index % 2}") for index, text in enumerate(texts)]
