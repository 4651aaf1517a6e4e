"""The last step of a job: staged shards get their final names in order, then the manifests are written.

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
from blt_data.gather import Documents, GatherOptions, source_column, write_documents
from blt_data.groups import GroupPlan
from blt_data.jobs import Job
from blt_data.ordering import MAX_DOCUMENTS
from blt_data.records import StepCount
from blt_data.shards import MANIFEST_NAME, Manifest, Shard, ShardEntry, ShardKind, write_manifest
from blt_data.shards.files import remove_temporaries
from blt_data.shards.schema import CONTENT, DOCUMENT_ID, SOURCE
from blt_data.skips import Skips
from blt_data.splits import HOLDOUT, TRAIN, WHOLE, split_directory

Staged: TypeAlias = tuple[Path, ShardEntry]


def finish_job(job: Job, plan: GroupPlan) -> dict[Path, Manifest]:
    """Make the shard directories of a job whose tasks are all finished, and remove its work directory's files.

    Args:
        job: the job.
        plan: its gather tasks.

    Returns:
        Shard directory to its manifest.

    Raises:
        InputError: a gather task is not finished, or a split has no document.
        OSError: a shard cannot be written.
    """
    staged: dict[str, list[Staged]] = {split: [] for split in job.scatter.splits}
    skipped = skipped_before(job, plan)
    for group in range(len(plan)):
        record = job.gathered(plan, group)
        if record is None:
            raise InputError(f"{job.output}: not every shard is written; run the stage before the last one to its end")
        skipped.merge(record.skipped)
        folder = job.gather_folder(plan, group)
        for split, entries in record.splits.items():
            staged[split] += [(folder / entry.name, entry) for entry in entries]
    _check_not_empty(staged, job.source)
    _remove_unfinished(job.output)
    manifests = {}
    for split, items in staged.items():
        directory = split_directory(job.output, split)
        directory.mkdir(exist_ok=True)
        placed = tuple(
            _place(group, directory / f"shard-{index:05d}.arrow", split, job.gather)
            for index, group in enumerate(_groups(items, job.gather.shard_bytes))
        )
        manifests[directory] = Manifest(
            kind=ShardKind.BYTES, shards=placed, provenance=job.gather.provenance[split], skipped=skipped
        )
    for directory, manifest in manifests.items():
        write_manifest(directory, manifest)
    return manifests


def skipped_before(job: Job, plan: GroupPlan) -> Skips:
    """Return what was left out before gathering: files, bad rows, and what the user's steps dropped.

    Args:
        job: the job.
        plan: its gather tasks.
    """
    skipped = Skips()
    skipped.merge(job.skipped)
    for task in plan.spilled:
        skipped.merge(task.record.skipped)
    for step in steps_of(plan):
        documents, size = step.documents_in - step.documents_out, step.bytes_in - step.bytes_out
        if documents > 0 or size > 0:
            skipped.add(f"dropped by {step.name}", count=max(0, documents), bytes=max(0, size))
    return skipped


def steps_of(plan: GroupPlan) -> tuple[StepCount, ...]:
    """Return what the user's steps did, summed over all tasks.

    Args:
        plan: of the job.
    """
    totals: list[StepCount] = []
    for task in plan.spilled:
        for index, step in enumerate(task.record.steps):
            if index == len(totals):
                totals.append(step)
            else:
                totals[index] = totals[index].plus(step)
    return tuple(totals)


def _check_not_empty(staged: Mapping[str, Sequence[Staged]], source: str) -> None:
    documents = {split: sum(entry.documents for _, entry in items) for split, items in staged.items()}
    if not sum(documents.values()):
        raise InputError(f"the source ({source}) holds no documents; name one that does")
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


def _place(group: Sequence[Staged], target: Path, split: str, options: GatherOptions) -> ShardEntry:
    if len(group) == 1:
        path, entry = group[0]
        try:
            os.link(path, target)
        except OSError:
            # Some file systems know no hard links. The manifest is not there yet, so a torn copy is never read.
            shutil.copyfile(path, target)
        return replace(entry, name=target.name)
    batches = [Shard.open(path).batch for path, _ in group]
    names = [name for batch in batches for name in batch.column(SOURCE).to_pylist()]
    documents = Documents(
        document_ids=pa.concat_arrays([batch.column(DOCUMENT_ID) for batch in batches]),
        contents=pa.concat_arrays([batch.column(CONTENT) for batch in batches]),
        sources=source_column(names, options.sources),
    )
    return write_documents(target, documents, options.provenance[split], options.compression)
