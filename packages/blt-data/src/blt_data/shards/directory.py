"""A shard directory: shards and their manifest, the unit that the packages hand to each other."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self, TypeAlias

from blt_data.errors import InputError
from blt_data.shards.files import file_crc32
from blt_data.shards.manifest import MANIFEST_NAME, SPLIT_NAMES, Manifest, ShardEntry, read_manifest
from blt_data.shards.reader import SHARD_MEND, Shard
from blt_data.shards.schema import ShardKind

log = logging.getLogger(__name__)

#: Told of bytes read since its last call, and of a shard that is done.
ShardProgress: TypeAlias = Callable[[int, ShardEntry | None], None]

_MEND = "delete the directory and run the command that wrote it again"


class ShardDirectory:
    """A complete shard directory, open for reading; use `ShardDirectory.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shards: dict[int, Shard] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, kind: ShardKind | None = None, verify: bool = False) -> Self:
        """Open a shard directory.

        Args:
            path: the directory, on a local file system.
            kind: the kind that the caller needs; None takes either.
            verify: recompute every checksum first; reads everything.

        Raises:
            InputError: the directory is missing, incomplete, damaged or of the other kind.
        """
        directory = Path(path)
        manifest = read_manifest(directory)
        if kind is not None and manifest.kind is not kind:
            mend = (
                "run blt-patch precompute on it and name its output"
                if kind is ShardKind.PATCHED
                else "name the directory that blt-data prepare wrote"
            )
            raise InputError(f"{directory}: holds shards of kind {manifest.kind}, needed is kind {kind}; {mend}")
        if verify and (problems := verify_directory(directory)):
            raise InputError(problems[0])
        for entry in manifest.shards:
            if problem := _size_problem(directory, entry):
                raise InputError(f"{problem}; {_MEND}")
        return cls(directory, manifest)

    @property
    def kind(self) -> ShardKind:
        """Kind of every shard."""
        return self.manifest.kind

    def __reduce__(self) -> tuple[object, ...]:
        # Another process opens the shards that it needs for itself.
        return type(self), (self.path, self.manifest)

    def __len__(self) -> int:
        return len(self.manifest.shards)

    def shard(self, index: int) -> Shard:
        """Return shard `index`, opened once and kept.

        Raises:
            InputError: the shard is damaged, or is not the one that the manifest names.
        """
        if index not in self._shards:
            self._shards[index] = self._open(index)
        return self._shards[index]

    def verified_shard(self, index: int) -> Shard:
        """Return shard `index` after recomputing its checksums, which reads the whole file; it is not kept.

        Raises:
            InputError: the shard is damaged, or is not the one that the manifest names.
        """
        entry = self.manifest.shards[index]
        if problem := _content_problem(self.path / entry.name, self.kind, entry):
            raise InputError(f"{problem}; {_MEND}")
        return self._open(index)

    def _open(self, index: int) -> Shard:
        entry = self.manifest.shards[index]
        shard = Shard.open(self.path / entry.name)
        if not _agrees(shard, self.kind, entry):
            raise InputError(f"{shard.path}: is not the shard that {MANIFEST_NAME} names; {_MEND}")
        return shard

    def documents(self) -> Iterator[tuple[int, int]]:
        """Yield (shard index, row) of every document in order."""
        for index, entry in enumerate(self.manifest.shards):
            for row in range(entry.documents):
                yield index, row


def _size_problem(directory: Path, entry: ShardEntry) -> str | None:
    file = directory / entry.name
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return f"{file}: is missing, though {MANIFEST_NAME} names it"
    if not file.is_file():
        return f"{file}: is no file, though {MANIFEST_NAME} names it"
    if size != entry.file_bytes:
        return f"{file}: has {size:,} bytes, {MANIFEST_NAME} says {entry.file_bytes:,}"
    return None


def shard_directories(path: Path) -> list[Path]:
    """Return the shard directories that a user means: the path itself, or its `train` and `holdout`.

    Args:
        path: what the user named; if it holds neither, it is returned, for its reader to say what is wrong. If one of
            the two is there and complete, the other is returned too if it is there at all.
    """
    splits = [path / split for split in SPLIT_NAMES]
    if not (path / MANIFEST_NAME).exists() and any((split / MANIFEST_NAME).exists() for split in splits):
        return [split for split in splits if split.exists()]
    return [path]


def verify_directory(
    path: str | os.PathLike[str], *, workers: int = 1, on_progress: ShardProgress | None = None
) -> list[str]:
    """Recompute every checksum of a shard directory.

    Args:
        path: the directory.
        workers: threads, each with one shard at a time; a compressed shard is decompressed into memory.
        on_progress: called, from any thread, with the bytes read since its last call, and with the entry of a shard
            that has just been checked, or None.

    Returns:
        One sentence per problem, each naming its file and the mend, in the order of the shards; empty if all is well.

    Raises:
        InputError: there is no manifest to compare with, or it is damaged.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    threads = ThreadPoolExecutor(max(1, min(workers, len(manifest.shards))))
    try:
        check = partial(_problem, directory, manifest.kind, on_progress)
        problems = [problem for problem in threads.map(check, manifest.shards) if problem is not None]
    finally:
        # After an interrupt only the shards that are being read are read to their end.
        threads.shutdown(cancel_futures=True)
    named = {entry.name for entry in manifest.shards}
    problems += [
        f"{file}: is not named by {MANIFEST_NAME}; delete it"
        for file in sorted(directory.glob("*.arrow"))
        if file.name not in named
    ]
    return problems


def _problem(directory: Path, kind: ShardKind, on_progress: ShardProgress | None, entry: ShardEntry) -> str | None:
    """Return what is wrong with a shard in one sentence with its mend, or None."""
    file = directory / entry.name
    advance = None if on_progress is None else partial(_tell_bytes, on_progress)
    try:
        problem = _size_problem(directory, entry) or _content_problem(file, kind, entry, advance)
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror or error}); check its permissions and the disk"
    except MemoryError:
        return f"{file}: there is too little memory to check it; use fewer workers or a larger machine"
    if on_progress is not None:
        on_progress(0, entry)
    return None if problem is None else f"{problem}; {_MEND}"


def _tell_bytes(on_progress: ShardProgress, amount: int) -> None:
    on_progress(amount, None)


def _content_problem(
    file: Path, kind: ShardKind, entry: ShardEntry, advance: Callable[[int], None] | None = None
) -> str | None:
    if file_crc32(file, advance) != entry.file_crc32:
        return f"{file}: does not have the checksum that {MANIFEST_NAME} says, so its bytes have changed"
    try:
        shard = Shard.open(file, verify=True)
    except InputError as error:
        return str(error).removesuffix(f"; {SHARD_MEND}")
    if not _agrees(shard, kind, entry):
        return f"{file}: has other figures than {MANIFEST_NAME} says"
    return None


def _agrees(shard: Shard, kind: ShardKind, entry: ShardEntry) -> bool:
    """Return whether a shard's own figures are those of the manifest."""
    figures = (shard.kind, shard.num_documents, shard.num_bytes, shard.num_patches, shard.has_entropies)
    stated = (kind, entry.documents, entry.bytes, entry.patches, entry.entropies)
    return figures == stated and shard.payload_sha256 == entry.payload_sha256
