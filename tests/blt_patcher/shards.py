"""Small shard directories and models to test on."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from blt_data import Manifest, ShardDirectory, ShardKind, write_manifest, write_shard

#: The command line, as installed.
EXECUTABLE = [sys.executable, "-m", "blt_patcher.cli"]


def make_bytes(directory: Path, shards: list[list[bytes]] | None = None, seed: int = 0) -> ShardDirectory:
    """Write a byte shard directory: the documents given, or some of every sort."""
    if shards is None:
        rng = np.random.default_rng(seed)
        words = [b"patch ", b"byte, ", b"12 ", "größer ".encode(), "日本語。".encode(), b"\r\n\x00"]
        texts = [b"".join(words[index] for index in rng.integers(0, len(words), size)) for size in range(4, 40)]
        shards = [[*texts[number::4], b"", b"x"] for number in range(4)]
    directory.mkdir(parents=True)
    entries = [
        write_shard(
            directory / f"shard-{number:05}.arrow",
            kind=ShardKind.BYTES,
            document_ids=[f"{number}-{row}" for row in range(len(documents))],
            contents=documents,
            sources=[f"source-{row % 2}" for row in range(len(documents))],
            provenance={"seed": seed},
        )
        for number, documents in enumerate(shards)
    ]
    write_manifest(directory, Manifest(kind=ShardKind.BYTES, shards=tuple(entries), provenance={"seed": seed}))
    return ShardDirectory.open(directory)


def make_model(directory: Path, *, preset_name: str = "entropy-debug", broken: bool = False) -> None:
    """Save a model with random weights."""
    import torch

    from blt_model import preset
    from blt_model.weights import save_model
    from blt_model.weights.streaming import build_model

    torch.manual_seed(0)
    model = build_model(preset(preset_name))
    if broken:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
    save_model(model, directory)


def tree(directory: Path) -> dict[str, str]:
    """Every file of a directory, hidden ones too, and its checksum."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}
