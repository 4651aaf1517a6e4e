"""Byte shards to patched shards, one by one: atomic, resumable, the same bytes however often the job was killed.

A patched shard holds in its own metadata all that decided on its content (the byte shards' fingerprint, scheme,
entropy model, precision, packages). A run that finds finished shards made from the same takes them as they are; one
that finds a shard made from anything else refuses the directory rather than mix the two.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt_data import (
    Manifest,
    Shard,
    ShardDirectory,
    ShardEntry,
    ShardKind,
    entry_of_finished_shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from blt_data.errors import InputError
from blt_data.shards import MANIFEST_NAME
from blt_patcher.boundaries import patch_documents
from blt_patcher.schemes import PatchScheme, scheme_to_json
from blt_patcher.windows import framed_offsets

log = logging.getLogger(__name__)

#: Arrow's lists count their items in 32 bits.
_LARGEST_LIST: Final = 2**31 - 1


class Scorer(Protocol):
    """What gives entropies; `entropies.EntropyScorer` does, without this module importing torch."""

    @property
    def identity(self) -> dict[str, Any]:
        """The model's fingerprint and configuration."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides on the last bits of the result besides the model."""

    def score(
        self,
        content: npt.NDArray[np.uint8],
        content_offsets: npt.NDArray[np.int64],
        *,
        name: str = ...,
        advance: Callable[[int], None] | None = None,
    ) -> npt.NDArray[np.float16]:
        """Return float16 [N + 2D] nats after each framed token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecomputeResult:
    """What a run of `precompute` did."""

    manifest: Manifest
    """The finished directory's manifest."""

    resumed_shards: int
    """Shards that an earlier run had finished."""


def precompute(
    source: ShardDirectory,
    output: str | os.PathLike[str],
    *,
    scheme: PatchScheme,
    scorer: Scorer | None = None,
    keep_entropies: bool = False,
    calibration: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] | None = None,
) -> PrecomputeResult:
    """Patch every shard of a directory; run again after a crash, it goes on where it was.

    Args:
        source: the byte shards.
        output: the directory to write; created if missing.
        scheme: how to patch.
        scorer: gives the entropies; needed if the scheme needs them or they are to be kept.
        keep_entropies: store the entropies beside the patch lengths.
        calibration: how the scheme's threshold was found, kept in provenance.
        advance: called with the number of framed tokens done, as they get done.

    Raises:
        InputError: the output holds something else or another process writes to it, an input shard is damaged, or the
            model is broken.
        OSError: the output cannot be written.
    """
    check_arguments(scheme, scorer is not None, keep_entropies)
    target = Path(output)
    provenance = patch_provenance(
        source, scheme=scheme, scorer=scorer, keep_entropies=keep_entropies, calibration=calibration
    )
    check_output(source, target, provenance)
    target.mkdir(parents=True, exist_ok=True)
    with held(target):
        entries: list[ShardEntry] = []
        resumed = 0
        for index, wanted in enumerate(source.manifest.shards):
            entry = entry_of_finished_shard(target / wanted.name)
            if entry is None:
                entry = patch_shard(
                    source.verified_shard(index),
                    target / wanted.name,
                    scheme=scheme,
                    scorer=scorer,
                    keep_entropies=keep_entropies,
                    provenance=provenance,
                    advance=advance,
                )
            else:
                log.info("%s is finished already", target / wanted.name)
                resumed += 1
                if advance is not None:
                    advance(wanted.bytes + 2 * wanted.documents)
            entries.append(entry)
        manifest = Manifest(kind=ShardKind.PATCHED, shards=tuple(entries), provenance=provenance)
        write_manifest(target, manifest)
    return PrecomputeResult(manifest=manifest, resumed_shards=resumed)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a directory for this process alone; a killed process holds nothing.

    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{directory}: another process is writing to it; wait for its end") from None
    except OSError:
        log.debug("%s lies on a file system that cannot lock directories", directory)
    try:
        yield
    finally:
        os.close(descriptor)


def patch_shard(
    shard: Shard,
    path: Path,
    *,
    scheme: PatchScheme,
    scorer: Scorer | None,
    keep_entropies: bool,
    provenance: Mapping[str, Any],
    advance: Callable[[int], None] | None = None,
) -> ShardEntry:
    """Write the patched form of one byte shard; the file appears only when it is whole.

    Args:
        shard: the byte shard.
        path: the file to write.
        scheme: how to patch.
        scorer: gives the entropies, or None if none are needed.
        keep_entropies: store the entropies too.
        provenance: what the new shard says of its making.
        advance: called with the number of framed tokens done.

    Returns:
        The new shard's entry for the manifest.

    Raises:
        InputError: the model gives entropies that are not finite, or the shard is too large for Arrow's lists.
        OSError: the file cannot be written.
    """
    offsets, content = shard.content_column()
    tokens = framed_offsets(offsets)
    if int(tokens[-1]) > _LARGEST_LIST:
        raise InputError(f"{shard.path}: has {int(tokens[-1]):,} tokens, too many for one shard; make it smaller")
    nats = None
    if scorer is not None:
        nats = scorer.score(content, offsets, name=str(shard.path), advance=advance)
    patched = patch_documents(scheme, content, offsets, nats)
    entry = write_shard(
        path,
        kind=ShardKind.PATCHED,
        document_ids=shard.batch.column("document_id"),
        contents=shard.batch.column("content"),
        sources=shard.batch.column("source"),
        patch_lengths=list_column(patched.offsets, patched.lengths),
        entropies=list_column(tokens, nats) if keep_entropies and nats is not None else None,
        provenance=provenance,
    )
    if scorer is None and advance is not None:
        advance(int(tokens[-1]))
    return entry


def patch_provenance(
    source: ShardDirectory,
    *,
    scheme: PatchScheme,
    scorer: Scorer | None,
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
        "packages": {name: version(name) for name in packages},
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
    if (output / MANIFEST_NAME).exists():
        manifest = read_manifest(output)
        _check_same(output, manifest.kind, manifest.provenance, provenance)
    for file in sorted(output.glob("*.arrow")):
        try:
            shard = Shard.open(file)
        except InputError:
            # Damaged, so it will be written anew if it is one of ours; a stranger's file is not ours to judge.
            log.warning("%s is damaged and will be written again", file)
            continue
        _check_same(file, shard.kind, shard.provenance, provenance)


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


def list_column(offsets: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> pa.Array:
    """Return an Arrow list column over values, without copying them."""
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
