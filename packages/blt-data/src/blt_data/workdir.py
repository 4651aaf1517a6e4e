"""The directory of an unfinished job, OUTPUT/.work: who may use it, and what is removed from it."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blt_data.errors import InputError
from blt_data.jobs import WORK_NAME, Job
from blt_data.records import RECORD_NAME, STATS_NAME, read_scatter_record
from blt_data.shards import MANIFEST_NAME, Manifest, read_manifest
from blt_data.splits import HOLDOUT, TRAIN, WHOLE, split_directory


def finished(output: Path) -> dict[Path, Manifest]:
    """Return the manifests of an output that is complete, whatever its parameters, or nothing.

    Args:
        output: the output of a job.

    Raises:
        InputError: a manifest is damaged.
    """
    for splits in ((WHOLE,), (TRAIN, HOLDOUT)):
        directories = [split_directory(output, split) for split in splits]
        if all((directory / MANIFEST_NAME).exists() for directory in directories):
            return {directory: read_manifest(directory) for directory in directories}
    return {}


def check_usable(output: Path) -> None:
    """Refuse an output that holds something that no unfinished job left.

    Raises:
        InputError: it does.
    """
    if output.is_dir() and not (output / WORK_NAME).exists() and any(output.iterdir()):
        raise InputError(
            f"{output}: is not empty and holds no unfinished run of blt-data prepare; name a new or an empty directory"
        )


@contextmanager
def working_directory(output: Path) -> Iterator[Path]:
    """Make OUTPUT/.work, held by this process alone; remove it at the end, or on failure if nothing is worth keeping.

    Raises:
        InputError: the output holds something that no unfinished job left, or another process is writing to it.
    """
    work = output / WORK_NAME
    check_usable(output)
    made = not output.exists()
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{output}: another process is writing to it; wait for its end") from None
        if finished(output):
            raise InputError(f"{output}: another process has just completed it; run the same command again")
        try:
            yield work
        except BaseException:
            if not _has_documents(work):
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    if made:
                        output.rmdir()
            raise
        shutil.rmtree(work)


def _has_documents(work: Path) -> bool:
    records = (read_scatter_record(path.parent) for path in work.glob(f"scatter/*/{RECORD_NAME}"))
    return any(record is not None and record.documents for record in records)


def discard_others(job: Job, keys: set[str]) -> int:
    """Remove scatter tasks that are not of this job, and what killed attempts left of those that are.

    Args:
        job: the job.
        keys: of its scatter tasks.

    Returns:
        How many finished tasks were removed.
    """
    folder = job.work / "scatter"
    folder.mkdir(exist_ok=True)
    discarded = 0
    for path in folder.iterdir():
        if path.name not in keys:
            discarded += (path / RECORD_NAME).exists()
            shutil.rmtree(path)
        else:
            _remove_leftovers(path)
    return discarded


def _remove_leftovers(folder: Path) -> None:
    record = read_scatter_record(folder)
    keep = set() if record is None else {RECORD_NAME, STATS_NAME, record.spill, f"{record.spill}.npy"}
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()


def discard_other_groups(job: Job, key: str) -> None:
    """Remove gather tasks of other plans, whose documents are other ones.

    Args:
        job: the job.
        key: of its plan.
    """
    folder = job.work / "gather"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name != key:
            shutil.rmtree(path)
