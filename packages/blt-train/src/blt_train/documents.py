"""The documents of a shard directory as flat arrays, the form in which the packing plan and the loader read them.

Nothing is copied but a few numbers per document; contents and patch lengths stay memory-mapped columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from blt_data.shards import ShardDirectory, ShardKind
from blt_train.errors import ConfigError

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentTable:
    """D documents of a shard directory, in the directory's order."""

    path: str
    """The directory, for messages."""

    kind: ShardKind
    """Whether the shards hold patch lengths."""

    tokens: Int64Array
    """int64 [D]: input tokens, that is BOS and the bytes; equally many targets, the bytes and EOS."""

    patches: Int64Array
    """int64 [D]: patches that hold at least one input token; zeros for byte shards."""

    shard: Int64Array
    """int64 [D]: index of the document's shard."""

    content_start: Int64Array
    """int64 [D]: the document's first byte in its shard's content column."""

    patch_start: Int64Array
    """int64 [D]: the document's first patch in its shard's patch column; zeros for byte shards."""

    contents: Sequence[npt.NDArray[np.uint8]]
    """Per shard: uint8 content column, memory-mapped."""

    patch_lengths: Sequence[npt.NDArray[np.uint16]]
    """Per shard: uint16 patch length column, memory-mapped; numba's own list, empty columns for byte shards."""

    @property
    def num_documents(self) -> int:
        """Number of documents D."""
        return self.tokens.size

    @property
    def num_targets(self) -> int:
        """Predictions in one pass over all documents: their bytes and EOS."""
        return int(self.tokens.sum())

    @property
    def num_bytes(self) -> int:
        """Raw bytes of all documents."""
        return self.num_targets - self.num_documents

    @property
    def mean_patch_length(self) -> float:
        """Input tokens per patch; nan for byte shards."""
        patches = int(self.patches.sum())
        return self.num_targets / patches if patches else float("nan")


def read_documents(directory: ShardDirectory) -> DocumentTable:
    """Read the table of a shard directory.

    Args:
        directory: byte or patched shards.

    Raises:
        ConfigError: there is no document.
        InputError: a shard cannot be read (from `blt_data`, naming the file).
    """
    columns: dict[str, list[Int64Array]] = {
        name: [] for name in ("tokens", "patches", "shard", "content_start", "patch_start")
    }
    contents: list[npt.NDArray[np.uint8]] = []
    lengths: list[npt.NDArray[np.uint16]] = []
    for index in range(len(directory)):
        shard = directory.shard(index)
        offsets, data = shard.content_column()
        rows = offsets.size - 1
        columns["tokens"].append(np.diff(offsets) + 1)
        columns["shard"].append(np.full(rows, index, dtype=np.int64))
        columns["content_start"].append(offsets[:-1])
        contents.append(data)
        if directory.kind is ShardKind.PATCHED:
            patch_offsets, patch_data = shard.patch_column()
            columns["patches"].append(_input_patches(patch_offsets, patch_data))
            columns["patch_start"].append(patch_offsets[:-1])
            lengths.append(patch_data)
        else:
            columns["patches"].append(np.zeros(rows, dtype=np.int64))
            columns["patch_start"].append(np.zeros(rows, dtype=np.int64))
            lengths.append(np.zeros(0, dtype=np.uint16))
    joined = {
        name: np.concatenate(parts).astype(np.int64, copy=False) if parts else np.zeros(0, dtype=np.int64)
        for name, parts in columns.items()
    }
    if joined["tokens"].size == 0:
        raise ConfigError(f"{directory.path}: the shards hold no document; prepare some data first")
    return DocumentTable(
        path=str(directory.path),
        kind=directory.kind,
        contents=contents,
        patch_lengths=_typed_list(lengths),
        **joined,
    )


def _input_patches(offsets: Int64Array, lengths: npt.NDArray[np.uint16]) -> Int64Array:
    """Return int64 [D]: patches that hold an input token; the last one does not where it is EOS alone."""
    eos_alone = lengths[offsets[1:] - 1] == 1
    counts: Int64Array = np.diff(offsets) - eos_alone
    return counts


def _typed_list(columns: Sequence[npt.NDArray[np.uint16]]) -> Sequence[npt.NDArray[np.uint16]]:
    """Return the columns as a list that numba kernels can index; all are made read-only views, so of one type."""
    typed = numba.typed.List()
    for column in columns:
        view = column.view()
        view.flags.writeable = False
        typed.append(view)
    result: Sequence[npt.NDArray[np.uint16]] = typed
    return result
