"""Two patchings of the same documents: how many boundaries they share, and where they differ most.

Tokens 0 and 1 start a patch under every scheme, so they say nothing and are not counted: a boundary here is a start at
a token from 2 on, splits by `max_patch_length` included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blt_data import Shard, ShardDirectory
from blt_data.errors import InputError
from blt_data.framing import FRAME_TOKENS
from blt_patcher.schemes import LONGEST_PATCH
from blt_patcher.stats import PatchStats

#: Examples kept unless told.
DEFAULT_EXAMPLES: Final = 3

#: Documents are compared in runs of about so many tokens, which bounds the memory.
_TOKENS_PER_RUN: Final = 1 << 23

#: A document with fewer boundaries is an example only where no other differs: two letters differ easily.
_TELLING_BOUNDARIES: Final = 16

_MEND: Final = "compare two patchings of the same byte shards"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A document that the two patchings cut differently."""

    document_id: str
    place_a: tuple[int, int]
    """Shard and row in directory A."""
    place_b: tuple[int, int]
    """Shard and row in directory B."""
    common: int
    """Boundaries that both have."""
    only_a: int
    only_b: int

    @property
    def jaccard(self) -> float:
        """Boundaries in common, as a share of those that either has."""
        return self.common / (self.common + self.only_a + self.only_b)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What two patchings of the same documents have in common."""

    documents: int
    identical: int
    """Documents with the same patches in both."""
    common: int
    """Boundaries that both have."""
    only_a: int
    only_b: int
    stats_a: PatchStats
    stats_b: PatchStats
    examples: tuple[Difference, ...]
    """Documents that differ most, the most different first."""

    @property
    def boundaries_a(self) -> int:
        """Boundaries of A."""
        return self.common + self.only_a

    @property
    def boundaries_b(self) -> int:
        """Boundaries of B."""
        return self.common + self.only_b

    @property
    def precision(self) -> float:
        """Share of B's boundaries that A has too; 1 where B has none."""
        return _share(self.common, self.boundaries_b)

    @property
    def recall(self) -> float:
        """Share of A's boundaries that B has too; 1 where A has none."""
        return _share(self.common, self.boundaries_a)

    @property
    def jaccard(self) -> float:
        """Boundaries in common, as a share of those that either has; 1 where there is none."""
        return _share(self.common, self.common + self.only_a + self.only_b)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return {
            "documents": self.documents,
            "identical_documents": self.identical,
            "boundaries_a": self.boundaries_a,
            "boundaries_b": self.boundaries_b,
            "common_boundaries": self.common,
            "precision": self.precision,
            "recall": self.recall,
            "jaccard": self.jaccard,
            "a": self.stats_a.to_json(),
            "b": self.stats_b.to_json(),
            "examples": [
                {
                    "document_id": each.document_id,
                    "common": each.common,
                    "only_a": each.only_a,
                    "only_b": each.only_b,
                }
                for each in self.examples
            ],
        }


def compare(
    a: ShardDirectory,
    b: ShardDirectory,
    *,
    examples: int = DEFAULT_EXAMPLES,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """Compare two patchings of the same documents.

    Documents are paired by their place where the directories hold the same ones in the same order, else by id and
    content.

    Args:
        a: patched shards; in precision and recall, what B is measured against.
        b: patched shards of the same documents.
        examples: how many documents that differ most to name.
        advance: called with content bytes, of either directory, whose checksums have been verified.

    Raises:
        InputError: the directories hold different documents, or a shard is damaged.
    """
    _check_figures(a, b)
    for directory in (a, b):
        for index, entry in enumerate(directory.manifest.shards):
            directory.verified_shard(index)
            if advance is not None:
                advance(entry.bytes)
    tally = _Tally(a, b, examples)
    for pairs in _paired_by_place(a, b) if _same_layout(a, b) else _paired_by_id(a, b):
        tally.add(pairs)
    return tally.result()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    """A run of D documents and both patchings of them."""

    ids: list[str]
    places_a: list[tuple[int, int]]
    places_b: list[tuple[int, int]]
    tokens: npt.NDArray[np.int64]
    """int64 [D] framed tokens of each."""
    lengths_a: npt.NDArray[np.uint16]
    """uint16 [P] patch lengths, document by document."""
    lengths_b: npt.NDArray[np.uint16]


@dataclass(slots=True)
class _Tally:
    """Counts over all runs so far."""

    a: ShardDirectory
    b: ShardDirectory
    wanted: int
    documents: int = 0
    identical: int = 0
    common: int = 0
    only_a: int = 0
    only_b: int = 0
    counts_a: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(LONGEST_PATCH + 1, np.int64))
    counts_b: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(LONGEST_PATCH + 1, np.int64))
    examples: list[tuple[tuple[bool, float, int, int], Difference]] = field(default_factory=list)

    def add(self, pairs: _Pairs) -> None:
        """Count one run of documents."""
        offsets = np.concatenate([[0], np.cumsum(pairs.tokens)])
        marks_a, marks_b = (_marks(lengths, offsets) for lengths in (pairs.lengths_a, pairs.lengths_b))
        totals_a, totals_b, common = (
            np.add.reduceat(marks, offsets[:-1], dtype=np.int64) for marks in (marks_a, marks_b, marks_a & marks_b)
        )
        only_a, only_b = totals_a - common, totals_b - common
        different = np.flatnonzero(only_a + only_b)
        self._keep_examples(pairs, different, common, only_a, only_b)
        self.documents += pairs.tokens.size
        self.identical += pairs.tokens.size - different.size
        self.common += int(common.sum())
        self.only_a += int(only_a.sum())
        self.only_b += int(only_b.sum())
        self.counts_a += np.bincount(pairs.lengths_a, minlength=self.counts_a.size)
        self.counts_b += np.bincount(pairs.lengths_b, minlength=self.counts_b.size)

    def _keep_examples(
        self,
        pairs: _Pairs,
        different: npt.NDArray[np.intp],
        common: npt.NDArray[np.int64],
        only_a: npt.NDArray[np.int64],
        only_b: npt.NDArray[np.int64],
    ) -> None:
        """Keep the documents that differ most of those so far and those of a run."""
        union = (common + only_a + only_b)[different]
        jaccard = common[different] / np.maximum(union, 1)
        order = np.lexsort((-union, jaccard, union < _TELLING_BOUNDARIES))[: self.wanted]
        for place in order.tolist():
            row = int(different[place])
            rank = (bool(union[place] < _TELLING_BOUNDARIES), float(jaccard[place]), -int(union[place]))
            example = Difference(
                document_id=pairs.ids[row],
                place_a=pairs.places_a[row],
                place_b=pairs.places_b[row],
                common=int(common[row]),
                only_a=int(only_a[row]),
                only_b=int(only_b[row]),
            )
            self.examples.append(((*rank, self.documents + row), example))
        self.examples = sorted(self.examples, key=lambda item: item[0])[: self.wanted]

    def result(self) -> Comparison:
        """Return what was counted."""
        manifest = self.a.manifest
        return Comparison(
            documents=self.documents,
            identical=self.identical,
            common=self.common,
            only_a=self.only_a,
            only_b=self.only_b,
            stats_a=PatchStats(documents=manifest.documents, bytes=manifest.bytes, counts=self.counts_a),
            stats_b=PatchStats(documents=manifest.documents, bytes=manifest.bytes, counts=self.counts_b),
            examples=tuple(example for _, example in self.examples),
        )


def first_difference(lengths_a: npt.NDArray[np.uint16], lengths_b: npt.NDArray[np.uint16]) -> int | None:
    """Return the first token that starts a patch in one patching of a document and not in the other, or None.

    Args:
        lengths_a: uint16 [P] patch lengths.
        lengths_b: uint16 [Q] those of the other patching.
    """
    ends_a, ends_b = (np.cumsum(lengths, dtype=np.int64) for lengths in (lengths_a, lengths_b))
    only_one = np.setxor1d(ends_a, ends_b, assume_unique=True)
    return int(only_one[0]) if only_one.size else None


def _marks(lengths: npt.NDArray[np.uint16], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return bool [T], true at the boundaries of a run of documents; tokens 0 and 1 of each are not marked."""
    marks = np.zeros(int(offsets[-1]) + 1, dtype=np.bool_)
    marks[np.cumsum(lengths, dtype=np.int64)] = True
    # Every document has two tokens or more, and its first patch is BOS alone.
    marks[offsets[:-1]] = False
    marks[offsets[:-1] + 1] = False
    return marks[:-1]


def _check_figures(a: ShardDirectory, b: ShardDirectory) -> None:
    """Refuse directories whose manifests tell already that their documents differ."""
    for name in ("documents", "bytes"):
        here, there = getattr(a.manifest, name), getattr(b.manifest, name)
        if here != there:
            raise InputError(f"{a.path} has {here:,} {name} and {b.path} has {there:,}; {_MEND}")


def _same_layout(a: ShardDirectory, b: ShardDirectory) -> bool:
    """Return whether both hold the same documents in the same places."""
    figures = [[(entry.documents, entry.bytes) for entry in each.manifest.shards] for each in (a, b)]
    return figures[0] == figures[1] and all(_same_documents(a.shard(i), b.shard(i)) for i in range(len(a)))


def _same_documents(a: Shard, b: Shard) -> bool:
    (offsets_a, content_a), (offsets_b, content_b) = a.content_column(), b.content_column()
    return (
        bool(np.array_equal(offsets_a, offsets_b))
        and bool(np.array_equal(content_a, content_b))
        and bool(a.batch.column("document_id").equals(b.batch.column("document_id")))
    )


def _runs(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield (first row, row after the last) of runs of documents, each of about `_TOKENS_PER_RUN` tokens."""
    tokens = shard.content_column()[0] + FRAME_TOKENS * np.arange(shard.num_documents + 1)
    begin = 0
    while begin < shard.num_documents:
        end = int(np.searchsorted(tokens, tokens[begin] + _TOKENS_PER_RUN, side="right")) - 1
        end = max(end, begin + 1)
        yield begin, end
        begin = end


def _paired_by_place(a: ShardDirectory, b: ShardDirectory) -> Iterator[_Pairs]:
    for index in range(len(a)):
        shards = a.shard(index), b.shard(index)
        for begin, end in _runs(shards[0]):
            lengths = []
            for shard in shards:
                offsets, values = shard.patch_column()
                lengths.append(values[offsets[begin] : offsets[end]])
            places = [(index, row) for row in range(begin, end)]
            yield _Pairs(
                ids=shards[0].batch.column("document_id").slice(begin, end - begin).to_pylist(),
                places_a=places,
                places_b=places,
                tokens=np.diff(shards[0].content_column()[0][begin : end + 1]) + FRAME_TOKENS,
                lengths_a=lengths[0],
                lengths_b=lengths[1],
            )


def _paired_by_id(a: ShardDirectory, b: ShardDirectory) -> Iterator[_Pairs]:
    """Pair every document of A with the one of B that has its id and content."""
    places: dict[str, list[tuple[int, int]]] = {}
    for index in range(len(b)):
        for row, name in enumerate(b.shard(index).batch.column("document_id").to_pylist()):
            places.setdefault(name, []).append((index, row))
    for index in range(len(a)):
        shard = a.shard(index)
        for begin, end in _runs(shard):
            ids = shard.batch.column("document_id").slice(begin, end - begin).to_pylist()
            partners = [_partner(a, b, (index, begin + row), name, places) for row, name in enumerate(ids)]
            offsets, values = shard.patch_column()
            yield _Pairs(
                ids=ids,
                places_a=[(index, row) for row in range(begin, end)],
                places_b=partners,
                tokens=np.diff(shard.content_column()[0][begin : end + 1]) + FRAME_TOKENS,
                lengths_a=values[offsets[begin] : offsets[end]],
                lengths_b=np.concatenate([b.shard(there).patch_lengths(row) for there, row in partners]),
            )


def _partner(
    a: ShardDirectory,
    b: ShardDirectory,
    place: tuple[int, int],
    name: str,
    places: dict[str, list[tuple[int, int]]],
) -> tuple[int, int]:
    """Return B's document with the id and content of one of A's, and take it out of those left.

    Raises:
        InputError: B has no such document.
    """
    content = a.shard(place[0]).content(place[1])
    left = places.get(name, [])
    for number, (index, row) in enumerate(left):
        if np.array_equal(b.shard(index).content(row), content):
            return left.pop(number)
    what = "has other content" if left else "is missing"
    raise InputError(f"document {name!r} of {a.path} {what} in {b.path}; {_MEND}")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
