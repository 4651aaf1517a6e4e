"""The documents of shards as flat arrays, the form in which the packing plan and the loader read them.

Nothing is copied but a few numbers per document; contents and patch lengths stay memory-mapped columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blt_data.shards import Shard, ShardDirectory, ShardKind
from blt_data.shards.schema import SOURCE
from blt_train.errors import ConfigError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentTable:
    """D documents of some shards, shard by shard, in the order of each."""

    path: str
    """The shard directory, for messages."""

    kind: ShardKind
    """Whether the shards hold patch lengths."""

    tokens: Int64Array
    """int64 [D]: input tokens, that is BOS and the bytes; equally many targets, the bytes and EOS."""

    patches: Int64Array
    """int64 [D]: patches that hold at least one input token; zeros for byte shards."""

    content_address: Int64Array
    """int64 [D]: where in memory the document's bytes are, in one of `columns`."""

    patch_address: Int64Array
    """int64 [D]: where in memory the document's uint16 patch lengths are, in one of `columns`; 0 for byte shards."""

    source: Int32Array
    """int32 [D]: index into `source_names` of where the document comes from."""

    source_names: tuple[str, ...]
    """Names in the shards' source column, sorted, each of at least one document."""

    columns: Sequence[npt.NDArray[Any]]
    """The memory-mapped columns that the addresses point into; they are valid as long as this holds them."""

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


def read_documents(
    directory: ShardDirectory,
    shards: Iterable[int] | None = None,
    *,
    open_shard: Callable[[int], Shard] | None = None,
) -> DocumentTable:
    """Read the table of a shard directory, or of some of its shards.

    Args:
        directory: byte or patched shards.
        shards: which of them, in this order; None for all.
        open_shard: opens a shard by its index; None for the directory itself, which keeps all that it has opened.

    Raises:
        ConfigError: there is no document.
        InputError: a shard cannot be read (from `blt_data`, naming the file).
    """
    chosen = range(len(directory)) if shards is None else list(shards)
    entries = directory.manifest.shards
    total = sum(entries[index].documents for index in chosen)
    if total == 0:
        raise ConfigError(f"{directory.path}: the shards hold no document; prepare some data first")
    is_patched = directory.kind is ShardKind.PATCHED
    tokens, content_address = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    patches, patch_address = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    source = np.empty(total, dtype=np.int32)
    names: dict[str, int] = {}
    columns: list[npt.NDArray[Any]] = []
    first = 0
    for index in chosen:
        shard = (open_shard or directory.shard)(index)
        rows = slice(first, first + len(shard))
        first += len(shard)
        offsets, content = shard.content_column()
        np.subtract(offsets[1:], offsets[:-1], out=tokens[rows])
        tokens[rows] += 1
        np.add(offsets[:-1], content.ctypes.data, out=content_address[rows])
        columns.append(content)
        if is_patched:
            patch_offsets, lengths = shard.patch_column()
            patches[rows] = _input_patches(patch_offsets, lengths)
            patch_address[rows] = lengths.ctypes.data + patch_offsets[:-1] * lengths.itemsize
            columns.append(lengths)
        source[rows] = _sources(shard, names)
    order, source_names = _sorted_names(source, names)
    return DocumentTable(
        path=str(directory.path),
        kind=directory.kind,
        tokens=tokens,
        patches=patches,
        content_address=content_address,
        patch_address=patch_address,
        source=order[source],
        source_names=source_names,
        columns=columns,
    )


def _input_patches(offsets: Int64Array, lengths: npt.NDArray[np.uint16]) -> Int64Array:
    """Return int64 [D]: patches that hold an input token; the last one does not where it is EOS alone."""
    eos_alone = lengths[offsets[1:] - 1] == 1
    counts: Int64Array = np.diff(offsets) - eos_alone
    return counts


def _sources(shard: Shard, names: dict[str, int]) -> Int32Array:
    """Return int32 [D]: the source of each document of a shard, as numbered in `names`, which new ones are added to."""
    column = shard.batch.column(SOURCE)
    numbers = [names.setdefault(name, len(names)) for name in column.dictionary.to_pylist()]
    indices = column.indices.to_numpy(zero_copy_only=False)
    found: Int32Array = np.array(numbers, dtype=np.int32)[indices]
    return found


def _sorted_names(source: Int32Array, names: dict[str, int]) -> tuple[Int32Array, tuple[str, ...]]:
    """Return int32 [N]: the place of each numbered name among the sorted ones in use, and these."""
    is_used = np.bincount(source, minlength=len(names)) > 0
    used = sorted(name for name, number in names.items() if is_used[number])
    order = np.zeros(len(names), dtype=np.int32)
    order[[names[name] for name in used]] = np.arange(len(used), dtype=np.int32)
    return order, tuple(used)
