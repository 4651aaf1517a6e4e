"""Making what a plan says: shards are linked, copied or written anew, then the manifests.

The output has no manifest until everything else is there. A run that was killed is taken up again: the plan's checksum
lies in OUTPUT/.work, and shards that are finished under the same plan are kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Final

import pyarrow as pa

from blt_data.cpus import available_cpus
from blt_data.errors import InputError
from blt_data.merging.plan import MergePlan, Target, TargetShard, complete_manifests
from blt_data.shards import (
    JSON,
    MANIFEST_NAME,
    Manifest,
    ShardDirectory,
    ShardEntry,
    entry_of_finished_shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from blt_data.shards.files import atomic_file, file_crc32, remove_temporaries, sync_directory
from blt_data.shards.manifest import SPLIT_NAMES
from blt_data.shards.schema import CONTENT, DOCUMENT_ID, ENTROPIES, PATCH_LENGTHS, SOURCE, ShardKind, canonical_json
from blt_data.skips import Skips

_WORK_NAME: Final = ".work"
_PLAN_NAME: Final = "merge"
_LOCK_NAME: Final = "lock"
_READ_SIZE: Final = 1 << 20


def run_merge(plan: MergePlan, on_shard: Callable[[ShardEntry], None] | None = None) -> dict[Path, Manifest]:
    """Make the output of a plan, or find that it is there already.

    Args:
        plan: what to make.
        on_shard: called, from any thread, with the entry of each shard that is there.

    Returns:
        Shard directory to its manifest.

    Raises:
        InputError: the output holds something else, another process writes to it, or an input changed meanwhile.
        OSError: a file cannot be read or written.
    """
    output = plan.config.output
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is no directory; name a directory to make")
    if complete_manifests(plan):
        manifests = _check_complete(plan)
        shutil.rmtree(output / _WORK_NAME, ignore_errors=True)
        return manifests
    with _working_directory(plan):
        made = {target.path: _make(plan, target, on_shard) for target in plan.targets}
        for path, manifest in made.items():
            write_manifest(path, manifest)
    return made


def _check_complete(plan: MergePlan) -> dict[Path, Manifest]:
    """Return the manifests of an output that is complete.

    Raises:
        InputError: it is not the plan's.
    """
    manifests = {}
    for target in plan.targets:
        manifest = read_manifest(target.path)
        for part in ("command", "inputs", "options"):
            if manifest.provenance.get(part) != target.provenance[part]:
                raise InputError(
                    f"{target.path}: is already complete with other content (its {part} differ); "
                    "name another --output or delete it"
                )
        ShardDirectory.open(target.path)
        manifests[target.path] = manifest
    return manifests


@contextmanager
def _working_directory(plan: MergePlan) -> Iterator[None]:
    """Hold OUTPUT/.work for this process alone; remove it at the end, or on failure if nothing is worth keeping.

    Raises:
        InputError: the output holds something that no unfinished merge left, or another process is writing to it.
    """
    output = plan.config.output
    work = output / _WORK_NAME
    state = work / _PLAN_NAME
    if output.is_dir() and not state.exists() and not _is_new(output):
        raise InputError(
            f"{output}: is not empty and holds no unfinished run of blt-data merge; name a new or an empty directory"
        )
    made = not output.exists()
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{output}: another process is writing to it; wait for its end") from None
        if complete_manifests(plan):
            raise InputError(f"{output}: another process has just completed it; run the same command again")
        try:
            _begin(plan, state)
            yield
        except BaseException:
            if not any(shard.path.exists() for target in plan.targets for shard in target.shards):
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    for target in plan.targets:
                        if target.path != output:
                            target.path.rmdir()
                    if made:
                        output.rmdir()
            raise
        shutil.rmtree(work)


def _is_new(output: Path) -> bool:
    """Return whether a directory holds nothing, or what a run leaves that was killed before it wrote its plan."""
    if any(path.name != _WORK_NAME for path in output.iterdir()):
        return False
    work = output / _WORK_NAME
    return not work.exists() or all(
        path.name == _LOCK_NAME or path.name.startswith(f".{_PLAN_NAME}.") for path in work.iterdir()
    )


def _begin(plan: MergePlan, state: Path) -> None:
    """Make the directories, without what an unfinished run of another plan left in them."""
    key = _key(plan)
    if state.exists() and state.read_text() != key:
        for folder in (*(plan.config.output / name for name in SPLIT_NAMES), plan.config.output):
            for file in (*folder.glob("shard-*.arrow"), folder / MANIFEST_NAME):
                file.unlink(missing_ok=True)
            if folder.is_dir():
                remove_temporaries(folder)
            # The output itself still holds what says that it is ours.
            with suppress(OSError):
                folder.rmdir()
    with atomic_file(state) as record:
        record.write(key.encode())
    for target in plan.targets:
        target.path.mkdir(exist_ok=True)
        remove_temporaries(target.path)


def _key(plan: MergePlan) -> str:
    """Return a checksum of all that decides the files of the output."""
    value: dict[str, JSON] = {
        target.path.name if target.path != plan.config.output else "": {
            "provenance": dict(target.provenance),
            "shards": [[asdict(entry) for entry in directory.manifest.shards] for directory in target.inputs],
        }
        for target in plan.targets
    }
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _make(plan: MergePlan, target: Target, on_shard: Callable[[ShardEntry], None] | None) -> Manifest:
    threads = ThreadPoolExecutor(max(1, plan.config.workers or available_cpus()))
    entries = []
    try:
        for entry in threads.map(partial(_place, plan, target), target.shards):
            entries.append(entry)
            if on_shard is not None:
                on_shard(entry)
    finally:
        # After an error or an interrupt only the shards that are being written are written to their end.
        threads.shutdown(cancel_futures=True)
    sync_directory(target.path)
    skipped = Skips()
    for directory in target.inputs:
        skipped.merge(directory.manifest.skipped)
    return Manifest(kind=target.kind, shards=tuple(entries), provenance=target.provenance, skipped=skipped)


def _place(plan: MergePlan, target: Target, shard: TargetShard) -> ShardEntry:
    """Make one shard, unless an earlier run has."""
    if not shard.rewritten:
        [piece] = shard.pieces
        _link_or_copy(piece.path, shard.path, piece.entry)
        return replace(piece.entry, name=shard.path.name)
    documents = sum(piece.stop - piece.start for piece in shard.pieces)
    finished = entry_of_finished_shard(shard.path)
    if finished is not None and finished.documents == documents:
        return finished
    return _rewrite(plan, target, shard)


def _link_or_copy(source: Path, target: Path, entry: ShardEntry) -> None:
    """Give a file a second name, or copy it where the file systems cannot.

    Raises:
        InputError: what was copied does not have its checksum.
    """
    if target.exists():
        if target.samefile(source) or file_crc32(target) == entry.file_crc32:
            return
        target.unlink()
    try:
        # The file itself, where the shard is a symbolic link to it.
        os.link(os.path.realpath(source), target)
    except OSError:
        # Another file system, or one that knows no hard links.
        with source.open("rb") as original, atomic_file(target) as copy:
            while block := original.read(_READ_SIZE):
                copy.write(block)
            if copy.crc32 != entry.file_crc32:
                raise InputError(
                    f"{source}: does not have the checksum that its {MANIFEST_NAME} says, so its bytes have changed; "
                    "delete the directory and run the command that wrote it again"
                ) from None


def _rewrite(plan: MergePlan, target: Target, shard: TargetShard) -> ShardEntry:
    provenance: Mapping[str, JSON] = target.provenance
    batches = []
    for piece in shard.pieces:
        # Opened anew, not kept: a plan may name more shards than fit into memory, or into the table of mappings.
        opened = ShardDirectory(piece.directory.path, piece.directory.manifest).shard(piece.shard)
        batches.append(opened.batch.slice(piece.start, piece.stop - piece.start))
        if len(shard.pieces) == 1 and piece.whole:
            # Its content is where it was: only the compression differs.
            provenance = opened.provenance

    def joined(name: str) -> pa.Array:
        columns = [batch.column(name) for batch in batches]
        return columns[0] if len(columns) == 1 else pa.concat_arrays(columns)

    patched = target.kind is ShardKind.PATCHED
    keep = {ENTROPIES in batch.schema.names for batch in batches}
    if len(keep) > 1:
        raise InputError(
            f"{shard.pieces[0].directory.path}: some shards keep entropies and others do not, "
            "so they cannot be joined; merge without --shard-size"
        )
    return write_shard(
        shard.path,
        kind=target.kind,
        document_ids=joined(DOCUMENT_ID),
        contents=joined(CONTENT),
        # As strings, so that the order of names does not depend on how the inputs were cut into shards.
        sources=pa.concat_arrays([batch.column(SOURCE).dictionary_decode() for batch in batches]),
        patch_lengths=joined(PATCH_LENGTHS) if patched else None,
        entropies=joined(ENTROPIES) if True in keep else None,
        provenance=provenance,
        compression=plan.config.compression or "none",
    )
