"""How many sequences each group of each source has, kept in the run directory to spare a resumed run their planning.

Where sequence number g lies follows from the numbers of sequences of all groups before it, and these only planning
tells. The file is a cache and nothing more: without it, or with one of other data, the groups are planned anew, and
the run goes on the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blt_train.files import replace_text

log = logging.getLogger(__name__)

COUNTS_NAME = "sequence-counts.json"
_FORMAT_VERSION = 1


def counts_key(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of what the counts of a source depend on.

    Args:
        parts: plain values: fingerprint of the shards, capacity, seed, limit of the groups.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_counts(run: Path, keys: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the counts that a run directory keeps, of the sources whose key is the same.

    Args:
        run: the run directory.
        keys: by source, `counts_key` of what its counts depend on.

    Returns:
        By source: sequences of each group, epoch after epoch; empty where nothing is known.
    """
    path = run / COUNTS_NAME
    found: dict[str, list[int]] = {name: [] for name in keys}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != _FORMAT_VERSION:
            return found
        for name, key in keys.items():
            entry = content["sources"].get(name, {"key": None})
            if entry["key"] == key:
                found[name] = [_count(value) for value in entry["counts"]]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s: cannot be used (%s), so the groups are counted anew", path, error)
        return {name: [] for name in keys}
    return found


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no number of sequences")
    return value


def write_counts(run: Path, keys: Mapping[str, str], counts: Mapping[str, Sequence[int]]) -> None:
    """Write the counts atomically.

    Args:
        run: the run directory.
        keys: as for `read_counts`.
        counts: by source, the sequences of each group, epoch after epoch.
    """
    sources = {name: {"key": key, "counts": list(counts[name])} for name, key in keys.items()}
    content = {"format_version": _FORMAT_VERSION, "sources": sources}
    replace_text(run / COUNTS_NAME, json.dumps(content) + "\n")
