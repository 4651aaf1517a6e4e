"""New boundaries for an already patched directory, from its stored entropies, with no model.

Entropies are dear and boundaries cheap: a directory that keeps its entropies can be cut by another threshold or
another scheme as fast as it can be read and written. What comes out is, to the byte, what `precompute` would have
written from the byte shards with the same model, settings and scheme. Schemes that read no entropies need none stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from blt_data import Manifest, Shard, ShardDirectory, ShardEntry, ShardKind, entry_of_finished_shard, write_shard
from blt_data.errors import InputError
from blt_data.framing import FRAME_TOKENS
from blt_data.shards import write_manifest
from blt_data.shards.schema import ENTROPIES
from blt_patcher.boundaries import default_threads, patch_documents
from blt_patcher.precompute import PrecomputeResult, check_output, held
from blt_patcher.schemes import PatchScheme, scheme_packages, scheme_to_json
from blt_patcher.shard_job import list_column

#: Packages whose releases decide on boundaries, and the one that decided on the entropies.
_PACKAGES: Final = ("blt-data", "blt-patcher")
_MODEL_PACKAGE: Final = "blt-model"


def repatch(
    source: ShardDirectory,
    output: str | os.PathLike[str],
    *,
    scheme: PatchScheme,
    keep_entropies: bool | None = None,
    calibration: Mapping[str, Any] | None = None,
    workers: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> PrecomputeResult:
    """Patch every shard of a patched directory anew; run again after a crash, it goes on where it was.

    Args:
        source: patched shards; they must keep their entropies if the scheme needs them.
        output: the directory to write; created if missing.
        scheme: how to patch.
        keep_entropies: store the entropies in the new shards too; None keeps them where there are any.
        calibration: how the scheme's threshold was found, kept in provenance.
        workers: shards done at once, in threads; None takes `default_threads()`.
        advance: called with the number of framed tokens done, as they get done.

    Raises:
        InputError: entropies are needed that the source does not keep, the output holds something else or another
            process writes to it, or an input shard is damaged.
        OSError: the output cannot be written.
    """
    keep = check_source(source, scheme, keep_entropies)
    target = Path(output)
    provenance = repatch_provenance(source.manifest, scheme=scheme, keep_entropies=keep, calibration=calibration)
    if target.exists() and target.resolve() == source.path.resolve():
        raise InputError(f"{target}: holds the shards to be cut anew; name another directory to write to")
    check_output(source, target, provenance)
    target.mkdir(parents=True, exist_ok=True)

    def one(index: int) -> tuple[ShardEntry, bool]:
        file = target / source.manifest.shards[index].name
        if (finished := entry_of_finished_shard(file)) is not None:
            return finished, True
        shard = source.verified_shard(index)
        return repatch_shard(shard, file, scheme=scheme, keep_entropies=keep, provenance=provenance), False

    with held(target):
        done = _in_threads(one, len(source), max(1, workers or default_threads()), advance)
        shards = tuple(entry for entry, _ in done)
        manifest = Manifest(kind=ShardKind.PATCHED, shards=shards, provenance=provenance)
        write_manifest(target, manifest)
    return PrecomputeResult(manifest=manifest, resumed_shards=sum(found for _, found in done))


def _in_threads(
    task: Callable[[int], tuple[ShardEntry, bool]], count: int, threads: int, advance: Callable[[int], None] | None
) -> list[tuple[ShardEntry, bool]]:
    """Return the results of tasks 0 to `count` - 1 in order, several run at once; the first error ends them."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="blt-repatch")
    try:
        futures = [pool.submit(task, index) for index in range(count)]
        for future in as_completed(futures):
            entry, _ = future.result()
            if advance is not None:
                advance(entry.bytes + FRAME_TOKENS * entry.documents)
        return [future.result() for future in futures]
    finally:
        # After an error the tasks not begun are left; those begun are ended, since threads cannot be stopped.
        pool.shutdown(wait=True, cancel_futures=True)


def check_source(source: ShardDirectory, scheme: PatchScheme, keep_entropies: bool | None) -> bool:
    """Return whether entropies go into the new shards, refusing a source without what is asked of it.

    Args:
        source: patched shards.
        scheme: how to patch.
        keep_entropies: whether to store the entropies; None where there are any.

    Raises:
        InputError: the scheme needs entropies or they are to be kept, and some shard has none.
    """
    lacking = [entry.name for entry in source.manifest.shards if not entry.entropies]
    mend = "run blt-patch precompute on the byte shards with an entropy model and keep its entropies"
    if lacking and scheme.needs_entropies:
        raise InputError(
            f"{source.path / lacking[0]}: keeps no entropies, which scheme {scheme.name} needs; {mend}, "
            "or choose a scheme that needs none"
        )
    if lacking and keep_entropies:
        raise InputError(f"{source.path / lacking[0]}: has no entropies to keep; {mend}, or do not keep them")
    return not lacking if keep_entropies is None else keep_entropies


def repatch_shard(
    shard: Shard, path: Path, *, scheme: PatchScheme, keep_entropies: bool, provenance: Mapping[str, Any]
) -> ShardEntry:
    """Write one patched shard anew; the file appears only when it is whole.

    Args:
        shard: the patched shard.
        path: the file to write.
        scheme: how to patch.
        keep_entropies: store the entropies too.
        provenance: what the new shard says of its making.

    Returns:
        The new shard's entry for the manifest.

    Raises:
        InputError: an entropy is not finite.
        OSError: the file cannot be written.
    """
    offsets, content = shard.content_column()
    nats = shard.entropy_column()[1] if scheme.needs_entropies else None
    try:
        patched = patch_documents(scheme, content, offsets, nats, threads=1)
    except InputError as error:
        raise InputError(f"{shard.path}: {error}") from error
    return write_shard(
        path,
        kind=ShardKind.PATCHED,
        document_ids=shard.batch.column("document_id"),
        contents=shard.batch.column("content"),
        sources=shard.batch.column("source"),
        patch_lengths=list_column(patched.offsets, patched.lengths),
        entropies=shard.batch.column(ENTROPIES) if keep_entropies else None,
        provenance=provenance,
    )


def repatch_provenance(
    manifest: Manifest, *, scheme: PatchScheme, keep_entropies: bool, calibration: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the provenance of new shards: the source's, with another scheme.

    The byte shards and, where entropies decided on the boundaries or are kept, the model and its settings stay. Where
    the entropies were made by other releases than those that patch now, `scored_by` names those.

    Args:
        manifest: of the source.
        scheme: how to patch.
        keep_entropies: whether the new shards store the entropies.
        calibration: how the scheme's threshold was found.
    """
    before = dict(manifest.provenance)
    scored = keep_entropies or scheme.needs_entropies
    told = before.get("packages")
    packages = {str(name): value for name, value in told.items()} if isinstance(told, dict) else {}
    now = {name: version(name) for name in _PACKAGES}
    model = {name: packages[name] for name in (_MODEL_PACKAGE,) if scored and name in packages}
    after = {
        **before,
        "scheme": scheme_to_json(scheme),
        "calibration": dict(calibration) if calibration is not None else None,
        "entropies_kept": keep_entropies,
        "packages": {**now, **model, **scheme_packages(scheme)},
    }
    after.pop("scored_by", None)
    if not scored:
        return {**after, "entropy_model": None, "entropy_settings": None}
    changed = bool(packages) and any(packages.get(name) != release for name, release in now.items())
    if older := before.get("scored_by") or (packages if changed else None):
        after["scored_by"] = older
    return after
