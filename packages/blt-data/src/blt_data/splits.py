"""Held-out documents: which they are, and where each split of a run is written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

#: The one split of a run that holds nothing out; its shard directory is the output itself.
WHOLE: Final = "all"
TRAIN: Final = "train"
HOLDOUT: Final = "holdout"


def splits_of_run(holdout_fraction: float | None) -> tuple[str, ...]:
    """Return the names of a run's splits."""
    return (WHOLE,) if holdout_fraction is None else (TRAIN, HOLDOUT)


def split_directory(output: Path, split: str) -> Path:
    """Return the shard directory of a split."""
    return output if split == WHOLE else output / split


def split_of(document_id: str, holdout_fraction: float | None) -> str:
    """Return the split of a document: a pure function of its id, so that it never moves between splits.

    The first 8 bytes of the id's SHA-256, as a big-endian fraction of 2**64, are below `holdout_fraction` for
    held-out documents; a larger fraction holds out the same documents and more.

    Args:
        document_id: the id.
        holdout_fraction: between 0 and 1, or None for one split of all.
    """
    if holdout_fraction is None:
        return WHOLE
    value = int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big")
    return HOLDOUT if value < holdout_fraction * 2**64 else TRAIN


def split_indices(document_ids: pa.StringArray, holdout_fraction: float | None) -> npt.NDArray[np.uint32]:
    """Return the split of each document, as its index among `splits_of_run`.

    Args:
        document_ids: n ids, no nulls.
        holdout_fraction: between 0 and 1, or None for one split of all.

    Returns:
        uint32 [n].
    """
    if holdout_fraction is None:
        return np.zeros(len(document_ids), np.uint32)
    names = document_ids.to_pylist()
    held_out = [split_of(name, holdout_fraction) == HOLDOUT for name in names]
    return np.array(held_out, np.bool_).astype(np.uint32)
