"""What a merge will make: which inputs fit together, and which documents go into which shard.

The plan, and with it every byte of the output, depends on the inputs' content, their order and the options alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from blt_data.cpus import available_cpus
from blt_data.errors import InputError
from blt_data.framing import FRAME_TOKENS
from blt_data.merging.compatible import check_compatible, common_facts
from blt_data.shards import JSON, MANIFEST_NAME, ShardDirectory, ShardEntry, ShardKind, ShardProgress, shard_directories
from blt_data.shards.manifest import SPLIT_NAMES

Compression: TypeAlias = Literal["none", "zstd"]

#: Documents of few bytes or none must not pile up in one shard either.
MAX_DOCUMENTS: Final = 1_000_000

#: Offsets of lists are int32, so this many framed tokens fit into a patched shard.
_MAX_TOKENS: Final = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """What to merge, and how."""

    inputs: tuple[Path, ...]
    """Shard directories, or directories that hold train and holdout, in the order of their documents."""
    output: Path
    compression: Compression | None = None
    """Write every shard anew with this compression; None leaves shards as they are where possible."""
    shard_bytes: int | None = None
    """Cut and join shards so that each holds at most this much content; None leaves their documents as they are."""
    allow_duplicates: bool = False
    """Take an input again that is given twice."""
    allow_mixed_splits: bool = False
    """Join held-out documents with others."""
    workers: int | None = None
    """Shards that are read and written at once; None for as many as CPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A run of documents of one input shard."""

    directory: ShardDirectory
    shard: int
    """Index of the shard."""
    start: int
    """First row."""
    stop: int
    """One past the last row."""

    @property
    def entry(self) -> ShardEntry:
        """What the input's manifest says of the shard."""
        return self.directory.manifest.shards[self.shard]

    @property
    def path(self) -> Path:
        """The shard's file."""
        return self.directory.path / self.entry.name

    @property
    def whole(self) -> bool:
        """Whether these are all documents of the shard."""
        return (self.start, self.stop) == (0, self.entry.documents)


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetShard:
    """One shard of the output."""

    path: Path
    pieces: tuple[Piece, ...]
    rewritten: bool
    """Whether it is written anew; otherwise the file of its one piece is linked or copied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One shard directory of the output."""

    path: Path
    inputs: tuple[ShardDirectory, ...]
    shards: tuple[TargetShard, ...]
    provenance: Mapping[str, JSON]

    @property
    def kind(self) -> ShardKind:
        """Kind of every shard."""
        return self.inputs[0].kind


@dataclass(frozen=True, kw_only=True, slots=True)
class MergePlan:
    """All that a merge will make."""

    config: MergeConfig
    targets: tuple[Target, ...]

    @property
    def shards(self) -> int:
        """Shards of all targets."""
        return sum(len(target.shards) for target in self.targets)

    @property
    def content_bytes(self) -> int:
        """Content of all targets."""
        return sum(directory.manifest.bytes for target in self.targets for directory in target.inputs)

    @property
    def rewrites(self) -> bool:
        """Whether any shard is written anew."""
        return any(shard.rewritten for target in self.targets for shard in target.shards)


def needs_reading(config: MergeConfig) -> bool:
    """Return whether a merge reads its inputs' content, which it then verifies first."""
    return config.compression is not None or config.shard_bytes is not None


def plan_merge(config: MergeConfig, on_progress: ShardProgress | None = None) -> MergePlan:
    """Check that inputs fit together, and decide what goes where.

    Where shards are to be written anew, every checksum of the inputs is verified first: damaged content must not get a
    checksum that is right.

    Args:
        config: what to merge.
        on_progress: called with file bytes, and with each shard that has been verified.

    Raises:
        InputError: an input is missing, incomplete or damaged, or the inputs do not fit together.
    """
    if not config.inputs:
        raise InputError("there is nothing to merge; name at least one shard directory")
    targets = []
    for path, directories in _by_split(config).items():
        check_compatible(
            directories,
            allow_duplicates=config.allow_duplicates,
            allow_mixed_splits=config.allow_mixed_splits,
        )
        if config.shard_bytes is not None and directories[0].kind is ShardKind.PATCHED:
            most = _MAX_TOKENS - FRAME_TOKENS * MAX_DOCUMENTS
            if config.shard_bytes > most:
                raise InputError(f"a shard of patches holds at most {most:,} bytes; give a smaller --shard-size")
        provenance = _provenance(config, directories)
        shards = tuple(
            TargetShard(
                path=path / f"shard-{index:05d}.arrow",
                pieces=pieces,
                rewritten=config.compression is not None or len(pieces) > 1 or not pieces[0].whole,
            )
            for index, pieces in enumerate(_pieces(config, directories, on_progress))
        )
        targets.append(Target(path=path, inputs=tuple(directories), shards=shards, provenance=provenance))
    return MergePlan(config=config, targets=tuple(targets))


def _by_split(config: MergeConfig) -> dict[Path, list[ShardDirectory]]:
    """Return each directory of the output and the inputs that go into it.

    Raises:
        InputError: some inputs hold train and holdout and others do not, or the output lies in an input.
    """
    output = Path(os.path.realpath(config.output))
    kinds: dict[tuple[str, ...], Path] = {}
    grouped: dict[Path, list[ShardDirectory]] = {}
    for given in config.inputs:
        # Unlike Path.resolve, this takes links that lead in circles.
        resolved = Path(os.path.realpath(given))
        if output == resolved or resolved in output.parents:
            raise InputError(f"{config.output}: is the input {given} or lies in it; name another --output")
        found = shard_directories(given)
        names = () if found == [given] else tuple(path.name for path in found)
        kinds.setdefault(names, given)
        for path in found:
            directory = ShardDirectory.open(path)
            grouped.setdefault(config.output / path.name if names else config.output, []).append(directory)
    if len(kinds) > 1:
        (first, one), (second, other) = list(kinds.items())[:2]
        raise InputError(
            f"{one}: {_holds(first)}, and {other}: {_holds(second)}; "
            f"name shard directories alone, such as {(one if first else other) / SPLIT_NAMES[0]}"
        )
    return grouped


def _holds(names: Sequence[str]) -> str:
    return f"holds {' and '.join(names)}" if names else "is itself a shard directory"


def _provenance(config: MergeConfig, directories: Sequence[ShardDirectory]) -> dict[str, JSON]:
    return {
        "command": "blt-data merge",
        "inputs": [
            {"fingerprint": directory.manifest.fingerprint(), "provenance": dict(directory.manifest.provenance)}
            for directory in directories
        ],
        "options": {"compression": config.compression, "shard_bytes": config.shard_bytes},
        "packages": {name: version(name) for name in ("blt-data", "pyarrow")},
        **common_facts(directories),
    }


def _pieces(
    config: MergeConfig, directories: Sequence[ShardDirectory], on_progress: ShardProgress | None
) -> Iterator[tuple[Piece, ...]]:
    """Yield the pieces of each shard of the output."""
    whole = [
        Piece(directory=directory, shard=index, start=0, stop=entry.documents)
        for directory in directories
        for index, entry in enumerate(directory.manifest.shards)
    ]
    if not needs_reading(config):
        yield from ((piece,) for piece in whole)
        return
    threads = ThreadPoolExecutor(max(1, config.workers or available_cpus()))
    try:
        lengths = threads.map(partial(_verified_lengths, on_progress), whole)
        if config.shard_bytes is None:
            yield from ((piece,) for piece, _ in zip(whole, lengths, strict=True))
        else:
            yield from _regroup(zip(whole, lengths, strict=True), config.shard_bytes)
    finally:
        threads.shutdown(cancel_futures=True)


def _verified_lengths(on_progress: ShardProgress | None, piece: Piece) -> npt.NDArray[np.int64]:
    """Return the length in bytes of each document of a whole shard, after verifying its checksums."""
    shard = piece.directory.verified_shard(piece.shard)
    lengths = np.diff(shard.content_column()[0])
    if on_progress is not None:
        on_progress(piece.entry.file_bytes, piece.entry)
    return lengths


def _regroup(shards: Iterable[tuple[Piece, npt.NDArray[np.int64]]], shard_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Yield runs of consecutive documents of at most `shard_bytes`, or of one larger document."""
    group: list[Piece] = []
    size = documents = 0
    for piece, lengths in shards:
        ends = np.cumsum(lengths, dtype=np.int64)
        start = taken = 0
        while start < len(lengths):
            # All documents that still fit; a document by itself always fits into an empty shard.
            stop = int(np.searchsorted(ends, taken + shard_bytes - size, side="right"))
            stop = min(max(stop, start), start + MAX_DOCUMENTS - documents)
            if stop == start and not group:
                stop = start + 1
            if stop > start:
                part = Piece(directory=piece.directory, shard=piece.shard, start=start, stop=stop)
                group.append(part)
                size += int(ends[stop - 1]) - taken
                documents += stop - start
                taken, start = int(ends[stop - 1]), stop
            if start < len(lengths):
                yield tuple(group)
                group, size, documents = [], 0, 0
    if group:
        yield tuple(group)


def complete_manifests(plan: MergePlan) -> bool:
    """Return whether every directory of the output has its manifest."""
    return all((target.path / MANIFEST_NAME).exists() for target in plan.targets)
