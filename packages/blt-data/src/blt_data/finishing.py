"""The last step of a run: staged shards get their final names in source order, then the manifests are written.

Staged files are linked, not moved, so that the step can begin anew at any time: whatever an interrupted attempt left
under final names is removed and made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from blt_data.errors import InputError
from blt_data.shards import JSON, MANIFEST_NAME, Manifest, Shard, ShardEntry, ShardKind, write_manifest
from blt_data.shards.files import remove_temporaries
from blt_data.shards.schema import CONTENT, DOCUMENT_ID
from blt_data.skips import Skips
from blt_data.splits import HOLDOUT, TRAIN, WHOLE, split_directory
from blt_data.staging import MAX_DOCUMENTS, read_record, write_byte_shard

Staged: TypeAlias = tuple[Path, ShardEntry]


def finish(
    output: Path,
    folders: Sequence[Path],
    *,
    provenance: Mapping[str, Mapping[str, JSON]],
    skipped: Mapping[str, int],
    source_name: str,
    shard_bytes: int,
) -> dict[Path, Manifest]:
    """Make the shard directories of a run whose tasks are all finished.

    Args:
        output: the run's output.
        folders: the tasks' folders, in source order.
        provenance: split to its provenance, for each split of the run.
        skipped: reason to number of source files left out.
        source_name: the `source` of every document.
        shard_bytes: content bytes up to which neighbouring small shards become one.

    Returns:
        Shard directory to its manifest.

    Raises:
        InputError: a split has no document.
        OSError: a shard cannot be written.
    """
    staged: dict[str, list[Staged]] = {split: [] for split in provenance}
    counts = Skips()
    for reason, count in skipped.items():
        counts.add(reason, count=count, bytes=0)
    for folder in folders:
        record = read_record(folder)
        if record is None:
            raise RuntimeError(f"{folder}: the task ended without its record")
        for reason, count in record.skipped.items():
            counts.add(reason, count=count, bytes=0)
        for split, entries in record.splits.items():
            staged[split] += [(folder / entry.name, entry) for entry in entries]
    _check_not_empty(staged, source_name)
    _remove_unfinished(output)
    manifests = {}
    for split, items in staged.items():
        directory = split_directory(output, split)
        directory.mkdir(exist_ok=True)
        placed = tuple(
            _place(group, directory / f"shard-{index:05d}.arrow", source_name, provenance[split])
            for index, group in enumerate(_groups(items, shard_bytes))
        )
        manifests[directory] = Manifest(
            kind=ShardKind.BYTES,
            shards=placed,
            provenance=provenance[split],
            skipped=counts,
        )
    for directory, manifest in manifests.items():
        write_manifest(directory, manifest)
    return manifests


def _check_not_empty(staged: Mapping[str, Sequence[Staged]], source_name: str) -> None:
    documents = {split: sum(entry.documents for _, entry in items) for split, items in staged.items()}
    if not sum(documents.values()):
        raise InputError(f"the source ({source_name}) holds no documents; name one that does")
    for split, count in documents.items():
        if not count:
            raise InputError(
                f"none of {sum(documents.values())} documents falls to the split {split!r}; "
                "choose another --holdout-fraction or a source of more documents"
            )


def _remove_unfinished(output: Path) -> None:
    """Remove what an interrupted finishing step, perhaps of another run, left under final names."""
    for directory in {split_directory(output, split) for split in (WHOLE, TRAIN, HOLDOUT)}:
        for path in (*directory.glob("shard-*.arrow"), directory / MANIFEST_NAME):
            path.unlink(missing_ok=True)
        if directory.is_dir():
            remove_temporaries(directory)
        if directory != output:
            # Anything else in it is not ours to remove, and then the directory stays.
            with suppress(OSError):
                directory.rmdir()


def _groups(items: Sequence[Staged], shard_bytes: int) -> Iterator[list[Staged]]:
    """Yield runs of neighbouring shards that fit into one: the ends of tasks, and the few held-out documents."""
    group: list[Staged] = []
    for item in items:
        together = [entry for _, entry in (*group, item)]
        fits = sum(entry.bytes for entry in together) <= shard_bytes
        if group and not (fits and sum(entry.documents for entry in together) <= MAX_DOCUMENTS):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _place(group: Sequence[Staged], target: Path, source_name: str, provenance: Mapping[str, JSON]) -> ShardEntry:
    if len(group) == 1:
        path, entry = group[0]
        try:
            os.link(path, target)
        except OSError:
            # Some file systems know no hard links. The manifest is not there yet, so a torn copy is never read.
            shutil.copyfile(path, target)
        return replace(entry, name=target.name)
    batches = [Shard.open(path).batch for path, _ in group]
    return write_byte_shard(
        target,
        pa.concat_arrays([batch.column(DOCUMENT_ID) for batch in batches]),
        pa.concat_arrays([batch.column(CONTENT) for batch in batches]),
        source_name=source_name,
        provenance=provenance,
    )
