"""How long the patches of a patched shard directory are: exact, from a count of every length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blt_data import Manifest, Shard, ShardDirectory
from blt_data.framing import FRAME_TOKENS
from blt_patcher.drift import target_patch_length
from blt_patcher.schemes import LONGEST_PATCH

#: Quantiles shown.
QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

#: Lengths up to here have a bar of their own in the histogram; longer ones share bars of doubling width.
SINGLE_BARS: Final = 16

_BAR_WIDTH: Final = 50

#: Width of a bar where two stand side by side.
_HALF_BAR: Final = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchStats:
    """The patch lengths of many documents."""

    documents: int
    bytes: int
    """Raw content bytes."""
    counts: npt.NDArray[np.int64]
    """int64 [65536] number of patches of each length in framed tokens."""

    @property
    def patches(self) -> int:
        """Number of patches."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """Framed tokens: the bytes, and BOS and EOS of every document."""
        return self.bytes + FRAME_TOKENS * self.documents

    @property
    def mean(self) -> float:
        """Mean patch length: framed tokens per patch; 0 where there is no patch."""
        return self.tokens / self.patches if self.patches else 0.0

    def quantile(self, share: float) -> int:
        """Return the least length such that at least a share of all patches is no longer; 0 where there is none."""
        if not self.patches:
            return 0
        return int(np.searchsorted(np.cumsum(self.counts), share * self.patches, side="left"))

    @property
    def longest(self) -> int:
        """The longest patch; 0 where there is none."""
        return int(np.flatnonzero(self.counts)[-1]) if self.patches else 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return bars (shortest length, longest length, patches), from length 1 to the longest there is."""
        return [(low, high, int(self.counts[low : high + 1].sum())) for low, high in _bar_ranges(self.longest)]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON; lengths are in framed tokens."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "patches": self.patches,
            "mean_patch_length": self.mean,
            "bytes_per_patch": self.bytes / self.patches if self.patches else 0.0,
            "quantiles": {f"{share:g}": self.quantile(share) for share in QUANTILES},
            "longest": self.quantile(1.0),
            "histogram": [{"from": low, "to": high, "patches": count} for low, high, count in self.histogram()],
        }


def collect_stats(
    directory: ShardDirectory,
    *,
    visit: Callable[[Shard], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> PatchStats:
    """Count the patch lengths of every document, verifying every shard's checksums on the way.

    Args:
        directory: patched shards.
        visit: called with every shard, so that others can count too while it is read.
        advance: called with the number of content bytes done.

    Raises:
        InputError: these are byte shards, or a shard is damaged.
    """
    counts = np.zeros(LONGEST_PATCH + 1, dtype=np.int64)
    for index, entry in enumerate(directory.manifest.shards):
        shard = directory.verified_shard(index)
        _, lengths = shard.patch_column()
        if visit is not None:
            visit(shard)
        counts += np.bincount(lengths, minlength=counts.size)
        if advance is not None:
            advance(entry.bytes)
    return PatchStats(documents=directory.manifest.documents, bytes=directory.manifest.bytes, counts=counts)


def draw_histogram(stats: PatchStats) -> str:
    """Return the histogram as text, one line a bar: lengths, share of all patches, a bar."""
    bars = stats.histogram()
    if not bars:
        return "(no patches)"
    tallest = max(count for _, _, count in bars)
    names = [f"{low}" if low == high else f"{low}–{high}" for low, high, _ in bars]
    width = max(len(name) for name in names)
    return "\n".join(
        f"{name:>{width}} {100 * count / stats.patches:6.2f}% {_bar(count / tallest)}".rstrip()
        for name, (_, _, count) in zip(names, bars, strict=True)
    )


def draw_histograms_side_by_side(a: PatchStats, b: PatchStats) -> str:
    """Return two histograms as text, one line a length: the share of patches and a bar for A, the same for B."""
    bars = paired_bars([a, b])
    if not bars:
        return "(no patches)"
    tallest = max(share for _, _, shares in bars for share in shares)
    names = [f"{low}" if low == high else f"{low}–{high}" for low, high, _ in bars]
    width = max(6, *(len(name) for name in names))
    lines = [f"{'length':>{width}}    A {'':{_HALF_BAR}}      B"]
    for name, (_, _, shares) in zip(names, bars, strict=True):
        left, right = (f"{100 * share:6.2f}% {_bar(share / tallest, _HALF_BAR):{_HALF_BAR}}" for share in shares)
        lines.append(f"{name:>{width}} {left} {right}".rstrip())
    return "\n".join(lines)


def _bar_ranges(longest: int) -> list[tuple[int, int]]:
    """Return the shortest and longest length of each bar, up to a length."""
    ranges = []
    low = 1
    while low <= longest:
        high = low if low <= SINGLE_BARS else min(2 * low - 2, LONGEST_PATCH)
        ranges.append((low, high))
        low = high + 1
    return ranges


def paired_bars(stats: Sequence[PatchStats]) -> list[tuple[int, int, list[float]]]:
    """Return bars that several sets of patches share: shortest length, longest length, each set's share of patches."""
    return [
        (low, high, [float(each.counts[low : high + 1].sum()) / max(each.patches, 1) for each in stats])
        for low, high in _bar_ranges(max((each.longest for each in stats), default=0))
    ]


def _bar(share: float, width: int = _BAR_WIDTH) -> str:
    """Return a bar of eighths of a character; anything above nothing shows."""
    eighths = round(share * width * 8) or int(share > 0)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def provenance_rows(manifest: Manifest) -> dict[str, object]:
    """Return the rows that tell how a patched directory was made."""
    scheme = manifest.provenance.get("scheme")
    model = manifest.provenance.get("entropy_model")
    rows: dict[str, object] = {}
    if isinstance(scheme, dict):
        rows["scheme"] = ", ".join(
            str(value) if key == "scheme" else f"{key} {value}"
            for key, value in scheme.items()
            if key != "version" and value is not None
        )
    target = target_patch_length(manifest)
    if target is not None:
        rows["target patch length"] = f"{target:g}"
    if isinstance(model, dict):
        rows["entropy model"] = str(model.get("fingerprint"))[:16]
    return rows
