"""`prepare`: documents of a source into a shard directory, resumable and reproducible.

    OUTPUT/.work/tasks/<key>/   staged shards of one task and its record       (pipeline.py, in parallel)
    OUTPUT/shard-00000.arrow    the staged shards under their final names      (finishing.py, in one process)
    OUTPUT/manifest.json        written last
    OUTPUT/.work                removed

A run that is killed leaves `.work`; the same command takes over every task that has its record, and finishes anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Final

from blt_data.errors import InputError
from blt_data.finishing import finish
from blt_data.plan import Task, plan_tasks, resolve_sources
from blt_data.recipe import Recipe, SourceSpec
from blt_data.shards import JSON, MANIFEST_NAME, Manifest, ShardDirectory, read_manifest
from blt_data.skips import ErrorPolicy
from blt_data.sources import Source
from blt_data.splits import HOLDOUT, TRAIN, WHOLE, split_directory, splits_of_run
from blt_data.staging import RECORD_NAME, read_record

WORK_NAME: Final = ".work"

#: Content bytes per shard unless told otherwise.
DEFAULT_SHARD_BYTES: Final = 64 << 20

#: Bytes to read for which starting another process (about a second) is worth its time.
_WORKER_BYTES: Final = 100_000_000

#: Takes source bytes read, documents and content bytes written since its last call.
ProgressSink = Callable[[int, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What to prepare and where."""

    source: str
    """`python-stdlib`, a file, a directory or a glob."""
    output: str | os.PathLike[str]
    """Directory to make; it may hold an unfinished run."""
    holdout_fraction: float | None = None
    """Share of documents, between 0 and 1, held out by a hash of their id; None holds out nothing."""
    limit_bytes: int | None = None
    """Take the first documents up to this many bytes, whole ones only; they are then read by one process."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    """Content bytes at which a shard is full; a larger document has its own."""
    text_column: str = "text"
    """Column or key that holds the text."""
    id_column: str = "id"
    """Column or key that holds the id; where it is missing, null or empty, `path#row` serves."""
    source_name: str | None = None
    """The `source` of every document; None takes the name of the file or directory."""
    workers: int | None = None
    """Processes; they change nothing but the time. None takes as many as CPUs, fewer for little data."""

    def __post_init__(self) -> None:
        if self.holdout_fraction is not None and not 0 < self.holdout_fraction < 1:
            raise InputError(f"holdout fraction must be between 0 and 1, both excluded, not {self.holdout_fraction}")
        for name in ("limit_bytes", "shard_bytes", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name.replace('_', ' ')} must be at least 1, not {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareStart:
    """What is known when the work begins."""

    files: int
    """Source files to read."""
    source_bytes: int
    """Bytes to read, as near as can be told beforehand."""
    tasks: int
    tasks_resumed: int
    """Tasks taken over from a run that did not end."""
    tasks_discarded: int
    """Tasks of an unfinished run with other parameters, other source files or other package versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareResult:
    """What a run left."""

    manifests: Mapping[Path, Manifest]
    """Shard directory to its manifest: the output itself, or its `train` and `holdout`."""
    already_complete: bool
    """The output was there already, prepared with the same parameters."""


def prepare(
    config: PrepareConfig,
    *,
    on_start: Callable[[PrepareStart], None] | None = None,
    on_progress: ProgressSink | None = None,
) -> PrepareResult:
    """Write the documents of a source to a shard directory.

    Args:
        config: what and where.
        on_start: called once before reading, unless the output is already complete.
        on_progress: called now and then in this process.

    Raises:
        InputError: bad input, or the output holds something else.
        OSError: input cannot be read or output cannot be written.
    """
    output = Path(config.output)
    spec = SourceSpec(
        source=config.source,
        name=config.source_name,
        text_column=config.text_column,
        id_column=config.id_column,
    )
    sources = resolve_sources(Recipe(sources=(spec,)), leave_out=output)
    source = sources[0].source
    provenance = _provenance(config, source)
    if manifests := _finished(output):
        _check_same(output, next(iter(manifests.values())).provenance, provenance)
        shutil.rmtree(output / WORK_NAME, ignore_errors=True)
        return PrepareResult(manifests=manifests, already_complete=True)
    _require_datatrove()
    # A limit on the total of bytes needs one task of everything.
    shard_bytes = config.shard_bytes if config.limit_bytes is None else 1 << 62
    tasks = plan_tasks(sources, shard_bytes=shard_bytes, context=provenance, policy=ErrorPolicy()).tasks
    with _working_directory(output) as work:
        folders = [work / "tasks" / task.key for task in tasks]
        start = _start(work / "tasks", folders, source, tasks)
        if on_start is not None:
            on_start(start)
        of_splits: dict[str, Mapping[str, JSON]] = {
            split: {**provenance, "split": split} for split in splits_of_run(config.holdout_fraction)
        }
        source_name = config.source_name or source.name
        _run_tasks(config, tasks, folders, of_splits, source_name, on_progress)
        manifests = finish(
            output,
            folders,
            provenance=of_splits,
            skipped={reason: skipped.count for reason, skipped in source.skipped.items()},
            source_name=source_name,
            shard_bytes=config.shard_bytes,
        )
    return PrepareResult(manifests=manifests, already_complete=False)


def _require_datatrove() -> None:
    """Import what only preparing needs, before anything is written.

    Raises:
        InputError: it is not installed.
    """
    try:
        import_module("blt_data.executor")
    except ModuleNotFoundError as error:
        raise InputError(
            f"prepare needs a package that is not installed ({error.name}); pip install 'blt-data[prepare]'"
        ) from error


def _run_tasks(
    config: PrepareConfig,
    tasks: Sequence[Task],
    folders: Sequence[Path],
    provenance: Mapping[str, Mapping[str, JSON]],
    source_name: str,
    on_progress: ProgressSink | None,
) -> None:
    # The light core (reading shards) works without datatrove, so these are imported here.
    from blt_data.executor import ShardExecutor
    from blt_data.pipeline import ByteLimit, ShardWriter, SourceReader

    reader = SourceReader(tasks)
    limit = [] if config.limit_bytes is None else [ByteLimit(config.limit_bytes)]
    writer = ShardWriter(
        folders,
        reader=reader,
        source_name=source_name,
        shard_bytes=config.shard_bytes,
        provenance=provenance,
        holdout_fraction=config.holdout_fraction,
    )
    ShardExecutor(
        [reader, *limit, writer],
        folders=folders,
        workers=config.workers or _worthwhile_workers(tasks),
        logging_dir=Path(config.output) / WORK_NAME / "datatrove",
        on_progress=on_progress,
    ).run()


def _worthwhile_workers(tasks: Sequence[Task]) -> int:
    # Only Linux tells which CPUs a container or a batch job leaves to this process.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, 1 + sum(task.weight for task in tasks) // _WORKER_BYTES)


def _provenance(config: PrepareConfig, source: Source) -> dict[str, JSON]:
    """Return where the documents come from: without paths, times or numbers of workers, which do not decide them."""
    names = ("holdout_fraction", "limit_bytes", "shard_bytes", "text_column", "id_column", "source_name")
    return {
        "command": "blt-data prepare",
        "source": source.provenance(),
        "options": {name: getattr(config, name) for name in names},
        "packages": {name: version(name) for name in ("blt-data", "pyarrow")},
    }


def _finished(output: Path) -> dict[Path, Manifest]:
    """Return the manifests of an output that is complete, whatever its parameters, or nothing."""
    for splits in ((WHOLE,), (TRAIN, HOLDOUT)):
        directories = [split_directory(output, split) for split in splits]
        if all((directory / MANIFEST_NAME).exists() for directory in directories):
            return {directory: read_manifest(directory) for directory in directories}
    return {}


def _check_same(output: Path, there: Mapping[str, JSON], here: Mapping[str, JSON]) -> None:
    """Refuse a complete output of other parameters; other package versions are no reason to do it again."""
    differences = [
        f"{name} is {_brief(old)} there, {_brief(new)} here"
        for part in ("command", "source", "options")
        for name, old, new in _pairs(part, there.get(part), here.get(part))
        if old != new
    ]
    if differences:
        raise InputError(
            f"{output}: is already complete with other parameters ({'; '.join(differences)}); "
            "name another --output or delete it"
        )
    for split in (WHOLE,) if (output / MANIFEST_NAME).exists() else (TRAIN, HOLDOUT):
        ShardDirectory.open(split_directory(output, split))


def _pairs(part: str, old: JSON, new: JSON) -> Iterator[tuple[str, JSON, JSON]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield key, old.get(key), new.get(key)
    else:
        yield part, old, new


def _brief(value: JSON) -> str:
    """Return a value for a message: long checksums shortened, None as the absence it is."""
    if value is None:
        return "not given"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


@contextmanager
def _working_directory(output: Path) -> Iterator[Path]:
    """Make OUTPUT/.work, held by this process alone; remove it at the end, or on failure if nothing is worth keeping.

    Raises:
        InputError: the output holds something that no unfinished run left, or another process is writing to it.
    """
    work = output / WORK_NAME
    if output.is_dir() and not work.exists() and any(output.iterdir()):
        raise InputError(
            f"{output}: is not empty and holds no unfinished run of blt-data prepare; name a new or an empty directory"
        )
    made = not output.exists()
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{output}: another process is writing to it; wait for its end") from None
        if _finished(output):
            raise InputError(f"{output}: another process has just completed it; run the same command again")
        try:
            yield work
        except BaseException:
            if not any((work / "tasks").glob(f"*/{RECORD_NAME}")):
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    if made:
                        output.rmdir()
            raise
        shutil.rmtree(work)


def _start(staging: Path, folders: Sequence[Path], source: Source, tasks: Sequence[Task]) -> PrepareStart:
    """Remove the folders of tasks that are not of this run, and datatrove's own marks, which we do not use."""
    staging.mkdir(exist_ok=True)
    shutil.rmtree(staging.parent / "datatrove", ignore_errors=True)
    mine = {folder.name for folder in folders}
    others = [folder for folder in staging.iterdir() if folder.name not in mine]
    for folder in others:
        shutil.rmtree(folder)
    return PrepareStart(
        files=len(source.files),
        source_bytes=sum(task.weight for task in tasks),
        tasks=len(tasks),
        tasks_resumed=sum(read_record(folder) is not None for folder in folders),
        tasks_discarded=len(others),
    )
