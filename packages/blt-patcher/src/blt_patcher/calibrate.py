"""Finding the threshold that gives a wanted mean patch length, exactly, on a stated sample.

Raising a threshold can only remove starts, and joining two patches never makes more pieces of at most m tokens than
they made apart. So the number of patches never rises with θ or θ_r, with or without `max_patch_length`, and bisection
over all finite float16 values finds the best of them with the real kernels: nothing is estimated. Values between
float16 numbers could not change a decision of θ, since entropies are float16 themselves.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blt_data import ShardDirectory
from blt_data.errors import InputError
from blt_data.framing import FRAME_TOKENS
from blt_patcher.boundaries import count_patches
from blt_patcher.schemes import EntropyCombinedScheme, EntropyMonotonicScheme, EntropyScheme, scheme_to_json
from blt_patcher.thresholds import finite_float16
from blt_patcher.windows import framed_offsets

EntropyBasedScheme = EntropyScheme | EntropyMonotonicScheme | EntropyCombinedScheme

#: Bytes of the sample unless told.
DEFAULT_SAMPLE_BYTES: Final = 4 * 1024 * 1024

#: A sample is taken from at most so many shards, because each one read is verified whole.
MAX_SAMPLE_SHARDS: Final = 32

#: Mean patch lengths that the curve is drawn at, where they can be had.
CURVE_TARGETS: Final = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Some documents of a byte shard directory, chosen by rule, so that the same directory gives the same sample."""

    content: npt.NDArray[np.uint8]
    """uint8 [N] the documents' bytes."""

    content_offsets: npt.NDArray[np.int64]
    """int64 [D + 1] document d is content[content_offsets[d]:content_offsets[d + 1]]."""

    statement: dict[str, Any]
    """The rule and what it gave, for provenance."""

    entropies: npt.NDArray[np.float16] | None = None
    """float16 [N + 2D] nats after each framed token, where the directory stores them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One threshold and what it gives on the sample."""

    threshold: float
    """In nats, a float16 number."""

    mean_patch_length: float
    """Framed tokens per patch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The threshold found for a target."""

    scheme: EntropyBasedScheme
    """The scheme with the threshold that was found."""

    parameter: str
    """Which of its thresholds was free: `threshold` or `relative_threshold`."""

    threshold: float
    """The value found for it, in nats, a float16 number."""

    target_patch_length: float
    """The mean patch length asked for, in framed tokens."""

    mean_patch_length: float
    """The mean patch length it gives on the sample, the nearest that any threshold gives."""

    curve: tuple[CurvePoint, ...]
    """Other thresholds and what they give, rising."""

    outline: tuple[CurvePoint, ...] = ()
    """More points of the same curve, evenly spaced over the thresholds that make a difference, for a figure."""

    def to_json(self) -> dict[str, Any]:
        """Return what provenance keeps of it; the sample's statement goes beside."""
        return {
            "parameter": self.parameter,
            "target_patch_length": self.target_patch_length,
            "mean_patch_length": self.mean_patch_length,
            "scheme": scheme_to_json(self.scheme),
        }


def take_sample(directory: ShardDirectory, sample_bytes: int = DEFAULT_SAMPLE_BYTES) -> Sample:
    """Choose documents to calibrate on, evenly spaced over a shard directory.

    At most `MAX_SAMPLE_SHARDS` shards, evenly spaced, are read and verified; from them come evenly spaced documents,
    as many as are expected to hold `sample_bytes`. The document that passes that number is cut there, and it is the
    last. Byte shards and the patched shards made of them give the same sample.

    Args:
        directory: byte shards, or patched shards, whose stored entropies come along if there are any.
        sample_bytes: bytes to take, at least 1; everything if there is less.

    Raises:
        InputError: there is no document, `sample_bytes` is less than 1, or a shard is damaged.
    """
    if sample_bytes < 1:
        raise InputError(f"the sample is to have {sample_bytes} bytes; it needs at least 1")
    filled = [index for index, entry in enumerate(directory.manifest.shards) if entry.documents]
    if not filled:
        raise InputError(f"{directory.path}: holds no document to calibrate on; prepare some data first")
    chosen = [filled[index] for index in _evenly_spaced(len(filled), min(len(filled), MAX_SAMPLE_SHARDS))]
    entries = [directory.manifest.shards[index] for index in chosen]
    documents = sum(entry.documents for entry in entries)
    total = sum(entry.bytes for entry in entries)
    wanted = documents if total <= sample_bytes else max(1, -(-documents * sample_bytes // total))
    picks = np.array(_evenly_spaced(documents, wanted), dtype=np.int64)
    stored = all(entry.entropies for entry in entries)
    pieces: list[npt.NDArray[np.uint8]] = []
    nats: list[npt.NDArray[np.float16]] = []
    taken = first = 0
    for index, entry in zip(chosen, entries, strict=True):
        shard = directory.verified_shard(index)
        for row in (picks[(picks >= first) & (picks < first + entry.documents)] - first).tolist():
            if taken < sample_bytes or not pieces:
                pieces.append(np.array(shard.content(row)[: sample_bytes - taken]))
                taken += pieces[-1].size
                if stored:
                    # The value after EOS is never used, so that of a cut document may be any.
                    nats.append(np.array(shard.entropies(row)[: pieces[-1].size + FRAME_TOKENS]))
        first += entry.documents
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([piece.size for piece in pieces], out=offsets[1:])
    statement = {
        "rule": "evenly spaced documents, the last one cut",
        "sample_bytes": sample_bytes,
        "shards": len(chosen),
        "documents": len(pieces),
        "bytes": taken,
    }
    entropies = np.concatenate(nats) if stored else None
    return Sample(content=np.concatenate(pieces), content_offsets=offsets, statement=statement, entropies=entropies)


def _evenly_spaced(total: int, count: int) -> list[int]:
    """Return `count` of the numbers below `total`, evenly spaced: the middles of `count` equal parts."""
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def calibrate(
    scheme: EntropyBasedScheme,
    parameter: str,
    target_patch_length: float,
    content: npt.NDArray[np.uint8],
    content_offsets: npt.NDArray[np.int64],
    entropies: npt.NDArray[np.float16],
    *,
    outline_points: int = 0,
) -> Calibration:
    """Find the threshold whose mean patch length over all documents is nearest a target.

    Of two that are equally near, the one with the shorter patches is taken. Many thresholds give the same patches;
    of those the one nearest zero is taken.

    Args:
        scheme: the scheme; the value of its free threshold does not matter.
        parameter: the free threshold's name, `threshold` or `relative_threshold`.
        target_patch_length: in framed tokens per patch.
        content: uint8 [N] the sample's bytes.
        content_offsets: int64 [D + 1] where each document's bytes begin.
        entropies: float16 [N + 2D] nats after each framed token.
        outline_points: about how many more points of the curve to find, for a figure.

    Raises:
        InputError: no threshold can give the target, the scheme has no such threshold, or the sample is empty.
    """
    check_target(target_patch_length)
    tokens = int(framed_offsets(content_offsets)[-1])
    if tokens == 0:
        raise InputError("there is no document to calibrate on")
    values = finite_float16()
    mean = _means(scheme, parameter, tokens, (content, content_offsets, entropies))
    _check_reach(target_patch_length, mean(0), mean(values.size - 1))
    best = _nearest(mean, Fraction(target_patch_length), values.size)
    curve = {best}
    for wanted in CURVE_TARGETS:
        if mean(0) <= wanted <= mean(values.size - 1):
            curve.add(_nearest(mean, Fraction(wanted), values.size))
    outline = {best, *_decisive(mean, values, outline_points)} if outline_points else set()

    def points(indices: set[int]) -> tuple[CurvePoint, ...]:
        return tuple(
            CurvePoint(threshold=float(values[index]), mean_patch_length=float(mean(index)))
            for index in sorted(indices)
        )

    threshold = float(values[best])
    return Calibration(
        scheme=with_threshold(scheme, parameter, threshold),
        parameter=parameter,
        threshold=threshold,
        target_patch_length=float(target_patch_length),
        mean_patch_length=float(mean(best)),
        curve=points(curve),
        outline=points(outline),
    )


def _means(
    scheme: EntropyBasedScheme,
    parameter: str,
    tokens: int,
    documents: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.float16]],
) -> Callable[[int], Fraction]:
    """Return the function that gives the mean patch length for the index of a float16 threshold, counted once each."""
    values = finite_float16()

    @cache
    def mean(index: int) -> Fraction:
        candidate = with_threshold(scheme, parameter, float(values[index]))
        return Fraction(tokens, count_patches(candidate, *documents))

    return mean


def _decisive(mean: Callable[[int], Fraction], values: npt.NDArray[np.float16], count: int) -> list[int]:
    """Return the indices of `count` thresholds, evenly spaced in nats over those that make a difference."""
    low = bisect_left(range(values.size), True, key=lambda index: mean(index) > mean(0)) - 1
    high = bisect_left(range(values.size), mean(values.size - 1), key=mean)
    wanted = np.linspace(float(values[max(low, 0)]), float(values[min(high, values.size - 1)]), count)
    places = np.searchsorted(values.astype(np.float64), wanted, side="right") - 1
    return [int(place) for place in places]


def with_threshold(scheme: EntropyBasedScheme, parameter: str, value: float) -> EntropyBasedScheme:
    """Return the scheme with one of its thresholds replaced.

    Args:
        scheme: an entropy scheme.
        parameter: `threshold` or `relative_threshold`.
        value: in nats.

    Raises:
        InputError: the scheme has no such threshold.
    """
    if parameter == "threshold" and not isinstance(scheme, EntropyMonotonicScheme):
        return replace(scheme, threshold=value)
    if parameter == "relative_threshold" and not isinstance(scheme, EntropyScheme):
        return replace(scheme, relative_threshold=value)
    raise InputError(f"scheme {scheme.name} has no {parameter!r} to calibrate")


def check_target(target: float) -> None:
    """Refuse a mean patch length that no patching whatsoever has.

    Raises:
        InputError: it is less than 1, or no number.
    """
    if not math.isfinite(target) or target < 1:
        raise InputError(f"a mean patch length of {target:g} is impossible: a patch has at least one token")


def _check_reach(target: float, least: Fraction, most: Fraction) -> None:
    """Refuse a target that no threshold gives on the sample."""
    if not least <= target <= most:
        if least == most:
            raise InputError(
                f"a mean patch length of {target:g} is impossible: on this sample every threshold gives "
                f"{float(least):.4g} tokens a patch; change the scheme or its other threshold"
            )
        raise InputError(
            f"a mean patch length of {target:g} is impossible: on this sample the scheme's thresholds give "
            f"{float(least):.4g} to {float(most):.4g} tokens a patch; choose a target between them"
        )


def _nearest(mean: Callable[[int], Fraction], target: Fraction, size: int) -> int:
    """Return the index whose mean is nearest a target, `mean` never falling; see `calibrate` for ties."""
    above = bisect_left(range(size - 1), target, key=mean)
    below = max(above - 1, 0)
    best = below if target - mean(below) <= mean(above) - target else above
    # All indices with this mean lie together; the index of zero is the middle one.
    first = bisect_left(range(size), mean(best), key=mean)
    last = bisect_left(range(size), True, lo=first, key=lambda index: mean(index) > mean(best)) - 1
    return min(max(size // 2, first), last)
