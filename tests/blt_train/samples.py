"""Documents, shard directories and configs for the tests of training."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from blt_data.shards import Manifest, ShardDirectory, ShardKind, write_manifest, write_shard
from blt_patcher import PatchScheme, SpaceScheme, patch_document, scheme_to_json
from blt_train import TrainConfig, load_config, read_metrics
from blt_train.batches import MicroBatch
from blt_train.checkpoint import Section
from blt_train.checkpoint.sections import open_section
from blt_train.documents import DocumentTable, read_documents
from blt_train.groups import ShardGroups
from blt_train.metrics import Metrics
from blt_train.plan import Capacity
from blt_train.sequences import SequenceStream
from blt_train.source_stream import SourceStream

WORDS = ["the", "cat", "sat", "on", "mat", "and", "looked", "at", "été", "東京", "moon", "while", "rain", ",", "\n"]


def text_documents(count: int, seed: int = 0, mean_words: int = 60) -> list[bytes]:
    """Documents of random words, some long, one empty, one of a single byte."""
    generator = np.random.default_rng(seed)
    documents = [
        " ".join(generator.choice(WORDS, size=int(generator.exponential(mean_words)) + 1)).encode()
        for _ in range(count - 2)
    ]
    return [*documents, b"", b"x"]


def write_documents(
    directory: Path,
    documents: Sequence[bytes],
    lengths: Sequence[npt.NDArray[np.uint16]] | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
    num_shards: int = 2,
    sources: Sequence[str] | None = None,
) -> Path:
    """Write a shard directory: byte shards, or patched ones where lengths are given."""
    directory.mkdir(parents=True, exist_ok=True)
    kind = ShardKind.BYTES if lengths is None else ShardKind.PATCHED
    provenance = dict(provenance or {})
    entries = []
    for index in range(num_shards):
        rows = range(index, len(documents), num_shards)
        column = None if lengths is None else pa.array([lengths[row] for row in rows], type=pa.list_(pa.uint16()))
        entries.append(
            write_shard(
                directory / f"shard-{index:05d}.arrow",
                kind=kind,
                document_ids=[str(row) for row in rows],
                contents=[documents[row] for row in rows],
                sources=["test" if sources is None else sources[row] for row in rows],
                patch_lengths=column,
                provenance=provenance,
            )
        )
    write_manifest(directory, Manifest(kind=kind, shards=tuple(entries), provenance=provenance))
    return directory


def write_patched(
    directory: Path,
    documents: Sequence[bytes],
    scheme: PatchScheme | None = None,
    *,
    entropies: Sequence[npt.NDArray[np.float16]] | None = None,
    entropy_fingerprint: str | None = None,
    num_shards: int = 2,
) -> Path:
    """Write a patched shard directory under a scheme, spaces by default."""
    scheme = scheme or SpaceScheme()
    rows: Sequence[npt.NDArray[np.float16] | None] = entropies or [None] * len(documents)
    lengths = [patch_document(scheme, content, row) for content, row in zip(documents, rows, strict=True)]
    provenance = {
        "scheme": scheme_to_json(scheme),
        "entropy_model": {"fingerprint": entropy_fingerprint} if entropy_fingerprint else None,
    }
    return write_documents(directory, documents, lengths, provenance=provenance, num_shards=num_shards)


def table_of(directory: Path) -> DocumentTable:
    """The documents of a shard directory."""
    return read_documents(ShardDirectory.open(directory))


def source_stream(
    directory: Path, capacity: Capacity, *, seed: int = 0, group_documents: int = 10**9, counts: Sequence[int] = ()
) -> SourceStream:
    """The sequences of one shard directory."""
    groups = ShardGroups(ShardDirectory.open(directory), seed=seed, group_documents=group_documents)
    return SourceStream(groups, capacity, seed=seed, counts=counts)


def stream_of(directory: Path, capacity: Capacity, *, group_documents: int = 10**9) -> SequenceStream:
    """The sequences of training on one shard directory."""
    return SequenceStream({"train": source_stream(directory, capacity, group_documents=group_documents)})


def sequence_rows(batch: MicroBatch, tokens: int) -> list[bytes]:
    """All that a batch says of each of its sequences of T tokens, independent of the other sequences in it."""
    packed = batch.packed
    rows = []
    for start in range(0, packed.tokens.numel(), tokens):
        own = slice(start, start + tokens)
        parts = [packed.tokens[own], batch.targets[own]]
        parts += [
            (offsets[(offsets >= start) & (offsets < start + tokens)] - start).long()
            for offsets in (packed.document_offsets, packed.patch_offsets)
            if offsets is not None
        ]
        if packed.decoder_patch is not None:
            parts.append(packed.decoder_patch[own] - packed.decoder_patch[start])
        rows.append(b"|".join(part.numpy().tobytes() for part in parts))
    return rows


def byte_config(root: Path, name: str, *overrides: str) -> TrainConfig:
    """The debug entropy config on `root`/bytes, in run directory `root`/`name`."""
    return load_config("debug-entropy", [f"run={root / name}", f"data.train={root / 'bytes'}", *overrides])


def blt_config(root: Path, name: str, *overrides: str) -> TrainConfig:
    """The debug BLT config on `root`/patched, in run directory `root`/`name`."""
    return load_config("debug-blt", [f"run={root / name}", f"data.train={root / 'patched'}", *overrides])


def without_times(metrics: Iterable[Metrics]) -> list[dict[str, Any]]:
    """Metrics as dictionaries, without what differs from launch to launch."""
    measured = re.compile(
        ".*seconds|data_wait|(bytes|patches|flops)_per_second.*|mfu|memory.*bytes|checkpoint_(seconds|bytes)"
    )
    rows = [dataclasses.asdict(item) for item in metrics]
    return [{key: value for key, value in row.items() if not measured.fullmatch(key)} for row in rows]


def section_tensors(checkpoint: Path, section: Section) -> dict[str, torch.Tensor]:
    """A section's tensors, from however many files."""
    reader = open_section(checkpoint, section)
    tensors = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in reader.tensors.items()}
    for name, tensor in tensors.items():
        reader.read(name, tensor)
    return tensors


def assert_same_tensors(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """The same names, each with the same numbers, to the bit."""
    assert sorted(mine) == sorted(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(mine[name].dtype == theirs[name].dtype for name in mine)


def assert_same_run(run: Path, other: Path) -> None:
    """Two runs ended with bit-identical weights and optimizers, and equal metrics."""
    for section in (Section.MODEL, Section.OPTIMIZER):
        assert_same_tensors(section_tensors(run / "latest", section), section_tensors(other / "latest", section))
    steps, evaluations = read_metrics(run)
    other_steps, other_evaluations = read_metrics(other)
    assert without_times(steps) == without_times(other_steps)
    assert without_times(evaluations) == without_times(other_evaluations)


def command(*arguments: str) -> list[str]:
    """The command line of `blt-train` with this interpreter."""
    return [sys.executable, "-m", "blt_train", *arguments]


def run_command(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `blt-train` in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout, check=False)
