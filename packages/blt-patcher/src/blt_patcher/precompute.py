"""Byte shards to patched shards: atomic, resumable, the same bytes however often it was killed and wherever it ran.

A patched shard holds in its own metadata all that decided on its content (the byte shards' fingerprint, scheme,
entropy model, precision, packages). A run that finds finished shards made from the same takes them as they are; one
that finds a shard made from anything else refuses the directory rather than mix the two.

Shards are patched in this process, or by the workers of an executor, one shard a task. Array jobs patch some shards
each into one directory; whichever finds all shards finished at its end writes the manifest.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from blt_data import (
    Manifest,
    Shard,
    ShardDirectory,
    ShardEntry,
    ShardKind,
    entry_of_finished_shard,
    read_manifest,
    write_manifest,
)
from blt_data.errors import InputError
from blt_data.executors import Executor, Report
from blt_data.shards import MANIFEST_NAME
from blt_patcher.schemes import PatchScheme, scheme_packages, scheme_to_json
from blt_patcher.scorers import Scorer, ScorerIdentity
from blt_patcher.shard_job import ShardJob, patch_in_this_process, start_worker

log = logging.getLogger(__name__)

#: Directory of executors within the output while it is written.
_WORK_NAME: Final = ".work"

#: Finished shards whose checksums are recomputed at once.
_READERS: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecomputeResult:
    """What a run of `precompute` did."""

    manifest: Manifest
    """The finished directory's manifest; of the shards finished so far where some are missing."""

    resumed_shards: int
    """Shards of this run that an earlier one had finished."""

    missing_shards: int = 0
    """Shards that are still to be patched, so that there is no manifest yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Where shards are patched if not in this process."""

    executor: Executor
    """Runs one task a shard."""

    load_scorer: Callable[[], Scorer] | None
    """Picklable; gives each worker its scorer. None where no entropies are needed."""


def precompute(
    source: ShardDirectory,
    output: str | os.PathLike[str],
    *,
    scheme: PatchScheme,
    scorer: Scorer | ScorerIdentity | None = None,
    keep_entropies: bool = False,
    calibration: Mapping[str, Any] | None = None,
    report: Report | None = None,
    on_shard: Callable[[ShardEntry, bool], None] | None = None,
    workers: Workers | None = None,
    only: Iterable[int] | None = None,
) -> PrecomputeResult:
    """Patch the shards of a directory; run again after a crash, it goes on where it was.

    Args:
        source: the byte shards.
        output: the directory to write; created if missing.
        scheme: how to patch.
        scorer: gives the entropies; needed if the scheme needs them or they are to be kept. With `workers` it only
            tells what their scorers are.
        keep_entropies: store the entropies beside the patch lengths.
        calibration: how the scheme's threshold was found, kept in provenance.
        report: called from any thread with the framed tokens done since its last call, the documents, and the tokens
            once more (an executor's `Report`); negative amounts take back what a failed attempt had told.
        on_shard: called with the entry of each shard that is finished, and whether an earlier run had finished it.
        workers: who patches; None patches in this process.
        only: indices of the shards to patch; None for all. Others may be patched into the same directory at the same
            time.

    Raises:
        InputError: the output holds something else or another process writes to it, an input shard is damaged, the
            model is broken, or some shards could not be patched by the workers.
        OSError: the output cannot be written.
    """
    check_arguments(scheme, scorer is not None, keep_entropies)
    target = Path(output)
    provenance = patch_provenance(
        source, scheme=scheme, scorer=scorer, keep_entropies=keep_entropies, calibration=calibration
    )
    check_output(source, target, provenance)
    target.mkdir(parents=True, exist_ok=True)
    wanted = list(range(len(source))) if only is None else sorted(set(only))
    job = ShardJob(source=source, output=target, scheme=scheme, keep_entropies=keep_entropies, provenance=provenance)
    missing = 0
    with held(target, shared=only is not None):
        entries = _finished(source, target, wanted)
        resumed = len(entries)
        for entry in entries.values():
            if on_shard is not None:
                on_shard(entry, True)
        _patch_others(job, scorer, workers, wanted, entries, on_shard, report or _say_nothing)
        if only is None:
            _complete(target, _manifest(entries, provenance))
    if only is not None:
        missing = _finish_if_complete(source, target, entries, provenance)
    return PrecomputeResult(manifest=_manifest(entries, provenance), resumed_shards=resumed, missing_shards=missing)


def _say_nothing(tokens: int, documents: int, content: int) -> None:
    """Report nothing."""


def _patch_others(
    job: ShardJob,
    scorer: Scorer | ScorerIdentity | None,
    workers: Workers | None,
    wanted: Iterable[int],
    entries: dict[int, ShardEntry],
    on_shard: Callable[[ShardEntry, bool], None] | None,
    report: Report,
) -> None:
    """Patch the wanted shards that have no entry yet, and add their entries; the other arguments are `precompute`'s."""

    def done(index: int, entry: ShardEntry) -> None:
        entries[index] = entry
        if on_shard is not None:
            on_shard(entry, False)

    left = [index for index in wanted if index not in entries]
    if workers is not None:
        _patch_elsewhere(job, workers, left, done, report)
    else:
        patch_in_this_process(job, _local(scorer), left, done, report)


def _local(scorer: Scorer | ScorerIdentity | None) -> Scorer | None:
    if scorer is not None and not hasattr(scorer, "score"):
        raise TypeError("patching in this process takes a scorer that scores")
    return scorer  # type: ignore[return-value]  # looked at just above


def _patch_elsewhere(
    job: ShardJob,
    workers: Workers,
    indices: list[int],
    on_entry: Callable[[int, ShardEntry], None],
    report: Report,
) -> None:
    """Patch some shards in an executor's workers.

    Raises:
        InputError: some could not be patched; the others are.
    """
    # Workers may stand in another directory.
    source = ShardDirectory(job.source.path.absolute(), job.source.manifest)
    placed = ShardJob(
        source=source,
        output=job.output.absolute(),
        scheme=job.scheme,
        keep_entropies=job.keep_entropies,
        provenance=job.provenance,
    )
    # What executors leave there when they are killed goes with it when the manifest is written.
    work = placed.output / _WORK_NAME
    work.mkdir(exist_ok=True)
    failures = workers.executor.run(
        partial(start_worker, placed, workers.load_scorer),
        indices,
        names=[str(job.source.path / job.source.manifest.shards[index].name) for index in indices],
        on_progress=report,
        on_result=lambda _, result: on_entry(result[1], result[0]),
        shared_directory=work,
    )
    if failures:
        first = failures[0].message if failures[0].name in failures[0].message else str(failures[0])
        others = f"; {len(failures) - 1} more could not be patched" if len(failures) > 1 else ""
        raise InputError(f"{first}{others}; the other shards are finished and kept")


def _finished(source: ShardDirectory, target: Path, indices: Iterable[int]) -> dict[int, ShardEntry]:
    """Return the entries of those shards that are finished, reading several at once."""
    places = list(indices)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="blt-verify") as pool:
        files = [target / source.manifest.shards[index].name for index in places]
        found = dict(zip(places, pool.map(entry_of_finished_shard, files), strict=True))
    entries = {index: entry for index, entry in found.items() if entry is not None}
    for index in entries:
        log.info("%s is finished already", target / source.manifest.shards[index].name)
    return entries


def _manifest(entries: Mapping[int, ShardEntry], provenance: Mapping[str, Any]) -> Manifest:
    shards = tuple(entries[index] for index in sorted(entries))
    return Manifest(kind=ShardKind.PATCHED, shards=shards, provenance=provenance)


def _complete(target: Path, manifest: Manifest) -> None:
    """Write the manifest of a directory that this process alone holds, and leave nothing else there."""
    shutil.rmtree(target / _WORK_NAME, ignore_errors=True)
    write_manifest(target, manifest)


def _finish_if_complete(
    source: ShardDirectory, target: Path, entries: dict[int, ShardEntry], provenance: Mapping[str, Any]
) -> int:
    """Write the manifest if no shard is missing, and return how many are.

    Of several array jobs that end at once, at least one comes here after all shards are there and gets the lock: the
    last to let go of it.

    Args:
        source: the byte shards.
        target: the directory.
        entries: of the shards that are known to be finished; the others' are added if all are there.
        provenance: of the shards.
    """
    names = [entry.name for entry in source.manifest.shards]
    missing = sum(not (target / name).exists() for name in names)
    if missing or (target / MANIFEST_NAME).exists():
        return missing
    try:
        with held(target):
            entries.update(_finished(source, target, (n for n in range(len(source)) if n not in entries)))
            if len(entries) == len(source):
                _complete(target, _manifest(entries, provenance))
    except InputError:
        log.info("another job is still writing to %s, and will write its manifest", target)
        return 0
    return len(source) - len(entries)


@contextmanager
def held(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a directory for this process; a killed process holds nothing.

    Args:
        directory: what to hold.
        shared: let others hold it too, as long as all of them ask for that.

    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{directory}: another process is writing to it; wait for its end") from None
    except OSError:
        log.debug("%s lies on a file system that cannot lock directories", directory)
    try:
        yield
    finally:
        os.close(descriptor)


def patch_provenance(
    source: ShardDirectory,
    *,
    scheme: PatchScheme,
    scorer: ScorerIdentity | None,
    keep_entropies: bool,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return all that decides on the content of patched shards, as they and their manifest keep it."""
    packages = ["blt-data", "blt-patcher", *(["blt-model"] if scorer is not None else [])]
    return {
        "byte_shards": {
            "fingerprint": source.manifest.fingerprint(),
            "provenance": dict(source.manifest.provenance),
        },
        "scheme": scheme_to_json(scheme),
        "calibration": dict(calibration) if calibration is not None else None,
        "entropy_model": scorer.identity if scorer is not None else None,
        "entropy_settings": scorer.settings if scorer is not None else None,
        "entropies_kept": keep_entropies,
        "packages": {**{name: version(name) for name in packages}, **scheme_packages(scheme)},
    }


def check_output(source: ShardDirectory, output: Path, provenance: Mapping[str, Any]) -> None:
    """Refuse an output directory that holds anything but finished shards of the same making.

    Args:
        source: the byte shards.
        output: the directory to write; it may be missing.
        provenance: what the new shards would say of their making.

    Raises:
        InputError: naming the first thing that differs, and the mend.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; name a directory to write to")
    if output.exists() and output.resolve() == source.path.resolve():
        raise InputError(f"{output}: holds the byte shards themselves; name another directory to write to")
    if not output.is_dir():
        return
    damage: InputError | None = None
    if (output / MANIFEST_NAME).exists():
        try:
            manifest = read_manifest(output)
        except InputError as error:
            damage = error
        else:
            _check_same(output, manifest.kind, manifest.provenance, provenance)
    ours = 0
    for file in sorted(output.glob("*.arrow")):
        try:
            shard = Shard.open(file)
        except InputError:
            # Damaged, so it will be written anew if it is one of ours; a stranger's file is not ours to judge.
            log.warning("%s is damaged and will be written again", file)
            continue
        _check_same(file, shard.kind, shard.provenance, provenance)
        ours += 1
    if damage is not None and ours:
        # The shards tell that the directory is this job's; without one, the file may be somebody else's only copy.
        raise InputError(
            f"{output / MANIFEST_NAME}: cannot be read; delete that file and run the same command again, which keeps "
            "the finished shards"
        ) from damage
    if damage is not None:
        raise damage


def check_arguments(scheme: PatchScheme, scored: bool, keep_entropies: bool) -> None:
    """Refuse a scheme without the entropies it needs, and entropies that nothing reads or keeps.

    Args:
        scheme: how to patch.
        scored: whether there is an entropy model.
        keep_entropies: whether entropies are to be stored.

    Raises:
        InputError: naming the mend.
    """
    if not scored and scheme.needs_entropies:
        raise InputError(f"scheme {scheme.name} needs entropies; name an entropy model")
    if not scored and keep_entropies:
        raise InputError("there are no entropies to keep without an entropy model; name one, or do not keep them")
    if scored and not scheme.needs_entropies and not keep_entropies:
        raise InputError(f"scheme {scheme.name} reads no entropies; leave the entropy model out, or keep its entropies")


def _check_same(place: Path, kind: ShardKind, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse what was made otherwise."""
    mend = "delete that directory, or name another --output"
    if kind is not ShardKind.PATCHED:
        raise InputError(f"{place}: is of kind {kind}, not patched; {mend}")
    difference = _first_difference(there, here)
    if difference:
        raise InputError(f"{place}: was made with other parameters ({difference}); {mend}")


def _first_difference(there: object, here: object, key: str = "") -> str | None:
    """Return the first difference of two JSON values in words, or None."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in [*here, *(name for name in there if name not in here)]:
            path = f"{key}.{name}" if key else str(name)
            if found := _first_difference(there.get(name), here.get(name), path):
                return found
        return None
    return None if there == here else f"{key} is {_short(there)} there and {_short(here)} here"


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
