"""Which shard directories may be joined."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from blt_data.errors import InputError
from blt_data.shards import JSON, ShardDirectory, ShardKind
from blt_data.shards.schema import canonical_json
from blt_data.splits import HOLDOUT

#: What readers of patched shards look up in their provenance; equal in all inputs.
_PATCHING: Final = ("scheme", "entropy_model")

#: What is kept in the provenance of a merge if it is the same in all inputs.
_KEPT: Final = (*_PATCHING, "entropy_settings", "entropies_kept", "calibration", "split")


def check_compatible(
    directories: Sequence[ShardDirectory], *, allow_duplicates: bool, allow_mixed_splits: bool
) -> None:
    """Refuse inputs that do not belong into one directory.

    Args:
        directories: the inputs.
        allow_duplicates: whether one may be given twice.
        allow_mixed_splits: whether held-out documents may be joined with others.

    Raises:
        InputError: two inputs differ in kind, patch scheme, entropy model or in keeping entropies; or hold the same; or
            one is held out and the other is not.
    """
    _check_same(directories, lambda directory: str(directory.kind), "shards of kind {}", "merge each kind by itself")
    if directories[0].kind is ShardKind.PATCHED:
        _check_same(directories, _scheme, "patches of the scheme {}", "patch both by one scheme")
        _check_same(directories, _model, "patches by the entropy model {}", "patch both with one entropy model")
        _check_same(
            directories, _model_options, "patches by an entropy model with {}", "patch both with the same options"
        )
        kept = [directory for directory in directories if directory.manifest.shards]
        _check_same(kept, _entropies, "shards {} entropies", "patch both with the same --entropies")
    if not allow_duplicates:
        _check_distinct(directories)
    if not allow_mixed_splits:
        held_out = [directory for directory in directories if _split(directory) == HOLDOUT]
        others = [directory for directory in directories if _split(directory) != HOLDOUT]
        if held_out and others:
            raise InputError(
                f"{held_out[0].path}: is held out and {others[0].path} is not, so joining them would let a model see "
                "what it is evaluated on; give --allow-mixed-splits if that is meant"
            )


def _check_same(
    directories: Sequence[ShardDirectory], fact: Callable[[ShardDirectory], str], noun: str, mend: str
) -> None:
    for other in directories[1:]:
        here, there = fact(directories[0]), fact(other)
        if here != there:
            raise InputError(
                f"{directories[0].path}: holds {noun.format(_brief(here))}, "
                f"and {other.path}: {noun.format(_brief(there))}; {mend}"
            )


def _check_distinct(directories: Sequence[ShardDirectory]) -> None:
    seen: dict[str, ShardDirectory] = {}
    for directory in directories:
        # Directories without shards all have one fingerprint, and are no duplicates of each other.
        if not directory.manifest.shards:
            continue
        other = seen.setdefault(directory.manifest.fingerprint(), directory)
        if other is not directory:
            what = (
                "is given twice"
                if os.path.realpath(other.path) == os.path.realpath(directory.path)
                else f"holds the same as {other.path}"
            )
            raise InputError(
                f"{directory.path}: {what}; give --allow-duplicates if its documents are to be there twice"
            )


def common_facts(directories: Sequence[ShardDirectory]) -> dict[str, JSON]:
    """Return the facts about patches and splits that all inputs share, for the provenance of what is joined.

    Args:
        directories: the inputs.
    """
    facts: dict[str, JSON] = {}
    for key in _KEPT:
        values = [
            _split(directory) if key == "split" else directory.manifest.provenance.get(key) for directory in directories
        ]
        always = key in _PATCHING and directories[0].kind is ShardKind.PATCHED
        if always or (values[0] is not None and all(value == values[0] for value in values)):
            facts[key] = values[0]
    return facts


def _split(directory: ShardDirectory) -> JSON:
    """Return the split that a directory says it is, its byte shards if it is patched; None if it does not say."""
    provenance: Mapping[str, JSON] = directory.manifest.provenance
    while isinstance(bytes_of := provenance.get("byte_shards"), dict) and isinstance(
        inner := bytes_of.get("provenance"), dict
    ):
        provenance = inner
    return provenance.get("split")


def _scheme(directory: ShardDirectory) -> str:
    return _text(directory.manifest.provenance.get("scheme"))


def _model(directory: ShardDirectory) -> str:
    model = directory.manifest.provenance.get("entropy_model")
    return _text(model.get("fingerprint") if isinstance(model, dict) else model)


def _model_options(directory: ShardDirectory) -> str:
    """Return how the model was used: where its contexts begin, say."""
    model = directory.manifest.provenance.get("entropy_model")
    if not isinstance(model, dict):
        return ""
    return canonical_json({key: value for key, value in model.items() if key not in ("fingerprint", "config")})


def _entropies(directory: ShardDirectory) -> str:
    states = {entry.entropies for entry in directory.manifest.shards}
    return "with and without" if len(states) > 1 else "with" if states == {True} else "without"


def _text(value: JSON) -> str:
    return canonical_json({"": value})[len('{"":') : -1]


def _brief(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"
