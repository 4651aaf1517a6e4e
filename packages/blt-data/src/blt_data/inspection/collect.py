"""The figures of a shard directory: of the whole from its manifest, of a stated sample of shards from their content."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from blt_data.framing import FRAME_TOKENS
from blt_data.inspection.preview import beginning, escape_bytes
from blt_data.inspection.scripts import CLASSES, count_scripts
from blt_data.shards import JSON, Manifest, Shard, ShardDirectory
from blt_data.shards.schema import SOURCE

#: Content bytes of shards that are looked into, by default.
DEFAULT_SAMPLE_BYTES: Final = 256 << 20

#: Largest number of bins of a histogram of int64 lengths: 0, 1, 2-3, 4-7 and so on.
_BINS: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """One bar of the histogram of document lengths."""

    first: int
    """Least length in bytes."""
    last: int
    """Greatest length in bytes."""
    documents: int
    bytes: int
    """Content bytes of these documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """How much of the sample one source or one script makes up."""

    name: str
    count: int
    """Documents of a source, characters of a script."""
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleDocument:
    """A document of the sample, shown."""

    document_id: str
    source: str
    bytes: int
    patches: int | None
    """None in a byte shard."""
    text: str
    """Its beginning, with what cannot be printed escaped."""
    cut: bool
    """Whether there is more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What is told of a shard directory."""

    path: Path
    manifest: Manifest
    columns: tuple[tuple[str, str], ...]
    """Name and Arrow type of each column; empty if there are no shards."""
    shards: int
    """Shards in the sample."""
    documents: int
    """Documents in the sample."""
    bytes: int
    """Content bytes in the sample."""
    seed: int
    """What the sample was drawn with."""
    quantiles: tuple[tuple[str, float], ...]
    """Name and length in bytes, over the documents of the sample."""
    lengths: tuple[Bin, ...]
    sources: tuple[Share, ...]
    scripts: tuple[Share, ...]
    shown: tuple[SampleDocument, ...]

    @property
    def sample(self) -> str:
        """The sample's size in words."""
        every = len(self.manifest.shards)
        of = (
            f"all {every:,} shards"
            if self.shards == every
            else f"{self.shards:,} of {every:,} shards, drawn with seed {self.seed}"
        )
        return f"{of}: {self.documents:,} documents, {self.bytes:,} bytes"

    @property
    def facts(self) -> dict[str, str]:
        """Fingerprint and provenance, flattened to dotted names."""
        return {"fingerprint": self.manifest.fingerprint()} | dict(_flat("", dict(self.manifest.provenance)))

    @property
    def mean_patch(self) -> float | None:
        """Framed tokens per patch over all shards (BOS and EOS count); None for byte shards."""
        patches = self.manifest.patches
        if patches is None:
            return None
        return (self.manifest.bytes + FRAME_TOKENS * self.manifest.documents) / max(1, patches)


def inspect_directory(
    path: Path,
    *,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    documents: int = 5,
    preview_bytes: int = 60,
    seed: int = 0,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Inspection:
    """Look into a shard directory.

    The sample is whole shards, drawn at random until their content reaches `sample_bytes`. Their checksums are verified
    first: what is shown is what was written, or nothing is.

    Args:
        path: the directory.
        sample_bytes: content bytes to look at; at least one shard is.
        documents: how many documents of the sample to show, drawn at random.
        preview_bytes: how many bytes of each to show.
        seed: what shards and documents are drawn with.
        on_progress: called with content bytes, documents and content bytes of each shard that was looked at.

    Raises:
        InputError: the directory is missing, incomplete or damaged.
    """
    directory = ShardDirectory.open(path)
    manifest = directory.manifest
    random = np.random.default_rng(seed)
    chosen = _draw(manifest, sample_bytes, random)
    # Drawn before anything is read, so that shards are opened one after another.
    total = sum(manifest.shards[index].documents for index in chosen)
    wanted = sorted(random.choice(total, size=min(documents, total), replace=False).tolist()) if total else []
    tally = _Tally()
    columns: tuple[tuple[str, str], ...] = ()
    shown = []
    first = 0
    for index in chosen:
        shard = directory.verified_shard(index)
        columns = tuple((field.name, str(field.type)) for field in shard.batch.schema)
        tally.add(shard)
        rows = [number - first for number in wanted if first <= number < first + len(shard)]
        shown += [_show(shard, row, preview_bytes) for row in rows]
        first += len(shard)
        if on_progress is not None:
            on_progress(shard.num_bytes, len(shard), shard.num_bytes)
    return Inspection(
        path=path,
        manifest=manifest,
        columns=columns,
        shards=len(chosen),
        documents=total,
        bytes=sum(manifest.shards[index].bytes for index in chosen),
        seed=seed,
        quantiles=tally.quantiles(),
        lengths=tally.bins(),
        sources=tally.source_shares(),
        scripts=tally.script_shares(),
        shown=tuple(shown),
    )


def _draw(manifest: Manifest, sample_bytes: int, random: np.random.Generator) -> list[int]:
    """Return the indexes of the shards of the sample, in order."""
    chosen: list[int] = []
    size = 0
    for index in random.permutation(len(manifest.shards)).tolist():
        if chosen and size >= sample_bytes:
            break
        chosen.append(index)
        size += manifest.shards[index].bytes
    return sorted(chosen)


class _Tally:
    """Adds up what shards hold."""

    def __init__(self) -> None:
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._scripts = np.zeros((len(CLASSES), 2), np.int64)
        self._sources: defaultdict[str, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(2, np.int64))

    def add(self, shard: Shard) -> None:
        offsets, content = shard.content_column()
        lengths = np.diff(offsets)
        self._lengths.append(lengths)
        # All documents of the shard at once: one that ends within a character is read on into the next one.
        self._scripts += count_scripts(content)
        column: pa.DictionaryArray = shard.batch.column(SOURCE)
        codes = column.indices.to_numpy()
        names = column.dictionary.to_pylist()
        documents = np.bincount(codes, minlength=len(names))
        # Sums of weights are floats: exact below 2**53 bytes, which no shard has.
        sizes = np.bincount(codes, weights=lengths, minlength=len(names)).astype(np.int64)
        for name, count, size in zip(names, documents, sizes, strict=True):
            if count:
                self._sources[str(name)] += (count, size)

    def _all_lengths(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.empty(0, np.int64), *self._lengths])

    def quantiles(self) -> tuple[tuple[str, float], ...]:
        lengths = self._all_lengths()
        if not len(lengths):
            return ()
        levels = {"minimum": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "99%": 0.99, "maximum": 1.0}
        values = np.quantile(lengths, list(levels.values()), method="inverted_cdf")
        return (
            ("mean", float(lengths.mean())),
            *((name, float(value)) for name, value in zip(levels, values, strict=True)),
        )

    def bins(self) -> tuple[Bin, ...]:
        lengths = self._all_lengths()
        if not len(lengths):
            return ()
        # Bin 0 holds 0, bin k holds 2**(k-1) to 2**k - 1.
        edges = np.int64(1) << np.arange(_BINS - 1)
        places = np.searchsorted(edges, lengths, side="right")
        documents = np.bincount(places)
        sizes = np.zeros(len(documents), np.int64)
        np.add.at(sizes, places, lengths)
        least = int(places.min())
        return tuple(
            Bin(
                first=0 if place == 0 else 1 << (place - 1),
                last=0 if place == 0 else (1 << place) - 1,
                documents=int(documents[place]),
                bytes=int(sizes[place]),
            )
            for place in range(least, len(documents))
        )

    def source_shares(self) -> tuple[Share, ...]:
        return _shares(Share(name=name, count=int(sums[0]), bytes=int(sums[1])) for name, sums in self._sources.items())

    def script_shares(self) -> tuple[Share, ...]:
        pairs = zip(CLASSES, self._scripts.tolist(), strict=True)
        return _shares(Share(name=name, count=count, bytes=size) for name, (count, size) in pairs if count)


def _shares(shares: Iterator[Share]) -> tuple[Share, ...]:
    return tuple(sorted(shares, key=lambda share: (-share.bytes, -share.count, share.name)))


def _show(shard: Shard, row: int, preview_bytes: int) -> SampleDocument:
    content = shard.content(row)
    start = beginning(content, preview_bytes)
    return SampleDocument(
        document_id=escape_bytes(shard.document_id(row).encode()),
        source=escape_bytes(shard.source(row).encode()),
        bytes=len(content),
        patches=None if shard.num_patches is None else len(shard.patch_lengths(row)),
        text=escape_bytes(start),
        cut=len(content) > len(start),
    )


def _flat(prefix: str, value: dict[str, JSON]) -> Iterator[tuple[str, str]]:
    """Yield nested facts under dotted names; the members of a list are numbered from 0."""
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, list) and any(isinstance(member, dict) for member in item):
            item = {str(number): member for number, member in enumerate(item)}
        if isinstance(item, dict):
            yield from _flat(f"{name}.", item)
        else:
            yield name, "none" if item is None else str(item)
