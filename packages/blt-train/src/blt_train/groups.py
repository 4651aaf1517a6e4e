"""The documents of a shard directory in groups small enough to be indexed and planned in memory.

A directory of at most `group_documents` documents is one group. A larger one is read group by group: each epoch its
shards are put into a random order, and neighbours are joined to groups of at most so many documents (a shard that has
more is a group of its own). Only the tables of the groups in use are in memory, and only their shards are open.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from blt_data.shards import Shard, ShardDirectory
from blt_train.documents import DocumentTable, read_documents
from blt_train.shuffling import permutation

#: Sets the order of shards apart from those of documents (0) and sequences (1) of the same seed and epoch.
_SHARD_ORDER = 2
#: Epochs whose groups are remembered: where one ends and the next begins, both are asked for.
_CACHED_EPOCHS = 4


class ShardGroups:
    """The groups of one shard directory, epoch by epoch."""

    def __init__(self, directory: ShardDirectory, *, seed: int, group_documents: int, verify: bool = False) -> None:
        """Prepare; nothing is read yet.

        Args:
            directory: byte or patched shards.
            seed: of the shards' order.
            group_documents: documents that a group holds at most, if it has more than one shard.
            verify: where there are several groups, recompute the checksums of each shard when it is read for the first
                time. A single group is not: whoever opens the directory can do so.
        """
        self.directory = directory
        self._seed = seed
        self._limit = group_documents
        self._verify = verify
        self._verified: set[int] = set()
        self._whole: DocumentTable | None = None
        #: Shards of each group of an epoch.
        self.shards_of_epoch = functools.lru_cache(maxsize=_CACHED_EPOCHS)(self._shards_of_epoch)
        #: Share of an epoch's documents that is in the groups before each group, and 1 at the end.
        self.shares_of_epoch = functools.lru_cache(maxsize=_CACHED_EPOCHS)(self._shares_of_epoch)

    @property
    def is_one_group(self) -> bool:
        """Whether all documents are planned together."""
        return self.directory.manifest.documents <= self._limit

    @property
    def group_documents(self) -> int | None:
        """What limits the groups, and so decides the order of data; None where all documents are one group."""
        return None if self.is_one_group else self._limit

    def documents(self, epoch: int, group: int) -> DocumentTable:
        """Read the documents of a group.

        Args:
            epoch: from 0.
            group: which of the epoch's groups, from 0.

        Raises:
            ConfigError: there is no document.
            InputError: a shard cannot be read.
        """
        if self.is_one_group:
            if self._whole is None:
                self._whole = read_documents(self.directory)
            return self._whole
        # Opened anew, so that the shards are closed as soon as nobody holds the table.
        directory = ShardDirectory(self.directory.path, self.directory.manifest)

        def open_shard(index: int) -> Shard:
            if not self._verify or index in self._verified:
                return directory.shard(index)
            shard = directory.verified_shard(index)
            self._verified.add(index)
            return shard

        return read_documents(directory, self.shards_of_epoch(epoch)[group], open_shard=open_shard)

    def _shares_of_epoch(self, epoch: int) -> Sequence[float]:
        entries = self.directory.manifest.shards
        sizes = [sum(entries[index].documents for index in shards) for shards in self.shards_of_epoch(epoch)]
        return [before / sum(sizes) for before in itertools.accumulate(sizes, initial=0)]

    def _shards_of_epoch(self, epoch: int) -> Sequence[Sequence[int]]:
        entries = self.directory.manifest.shards
        if self.is_one_group:
            return (range(len(entries)),)
        groups: list[list[int]] = []
        documents = 0
        for index in permutation(len(entries), self._seed, epoch, _SHARD_ORDER).tolist():
            count = entries[index].documents
            if count == 0:
                continue
            if not groups or documents + count > self._limit:
                groups.append([])
                documents = 0
            groups[-1].append(index)
            documents += count
        return groups
