"""Calibration: no other threshold comes nearer, checked against every threshold that makes a difference."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_patcher.patched import HashScorer, make_patched
from tests.blt_patcher.plain import patch_plainly

from blt_data import Manifest, ShardDirectory, ShardKind, write_manifest, write_shard
from blt_data.errors import InputError
from blt_patcher import EntropyCombinedScheme, EntropyMonotonicScheme, EntropyScheme, SpaceScheme
from blt_patcher.calibrate import EntropyBasedScheme, calibrate, take_sample, with_threshold
from blt_patcher.thresholds import finite_float16

CASES: list[tuple[EntropyBasedScheme, str]] = [
    (EntropyScheme(threshold=9.0), "threshold"),
    (EntropyScheme(threshold=9.0, max_patch_length=6), "threshold"),
    (EntropyMonotonicScheme(relative_threshold=9.0), "relative_threshold"),
    (EntropyMonotonicScheme(relative_threshold=9.0, max_patch_length=5), "relative_threshold"),
    (EntropyCombinedScheme(threshold=9.0, relative_threshold=0.25), "threshold"),
    (EntropyCombinedScheme(threshold=1.0, relative_threshold=9.0, max_patch_length=7), "relative_threshold"),
]

#: One document of three bytes.
OFFSETS = np.array([0, 3])


def entropies_of(seed: int, size: int) -> npt.NDArray[np.float16]:
    """Entropies like those of text, some of them equal."""
    return np.round(np.random.default_rng(seed).exponential(1.4, size), 1).astype(np.float16)


def decisive_thresholds(documents: list[npt.NDArray[np.float16]]) -> list[float]:
    """One float16 from every range of thresholds that give the same patches, of either kind."""
    everything = finite_float16().astype(np.float64)
    levels = np.concatenate([nats.astype(np.float64) for nats in documents])
    rises = np.concatenate([np.diff(nats.astype(np.float64)) for nats in documents])
    # A value exceeds a threshold or not: what counts is the least float16 that is not below the value.
    places = np.searchsorted(everything, np.concatenate([levels, rises]), side="left")
    return [float(everything[0]), *(float(everything[place]) for place in np.unique(places))]


def plain_mean(scheme: EntropyBasedScheme, documents: list[npt.NDArray[np.float16]]) -> Fraction:
    patches = sum(len(patch_plainly(scheme, bytes(nats.size - 2), nats)) for nats in documents)
    return Fraction(sum(nats.size for nats in documents), patches)


@pytest.mark.parametrize(("scheme", "parameter"), CASES, ids=str)
@settings(max_examples=6)
@given(seed=st.integers(0, 1000), target=st.floats(1.0, 5.0))
def test_no_threshold_comes_nearer(scheme: EntropyBasedScheme, parameter: str, seed: int, target: float) -> None:
    documents = [entropies_of(seed + index, size) for index, size in enumerate((2, 3, 40, 25))]
    content = np.zeros(sum(nats.size - 2 for nats in documents), np.uint8)
    offsets = np.cumsum([0, *(nats.size - 2 for nats in documents)], dtype=np.int64)
    means = {
        plain_mean(with_threshold(scheme, parameter, value), documents) for value in decisive_thresholds(documents)
    }
    arguments = (scheme, parameter, target, content, offsets, np.concatenate(documents))
    if not min(means) <= target <= max(means):
        with pytest.raises(InputError, match=r"is impossible: on this sample (the scheme's|every) threshold"):
            calibrate(*arguments)
        return
    found = calibrate(*arguments)
    best = min(means, key=lambda mean: (abs(mean - Fraction(target)), mean))
    assert found.mean_patch_length == float(best)
    assert found.threshold == float(np.float16(found.threshold))
    assert getattr(found.scheme, parameter) == found.threshold
    assert plain_mean(found.scheme, documents) == best
    if found.threshold:
        # The nearest to zero of those that give these patches.
        nearer = float(np.nextafter(np.float16(found.threshold), np.float16(0)))
        assert plain_mean(with_threshold(scheme, parameter, nearer), documents) != best
    assert [point.threshold for point in found.curve] == sorted({point.threshold for point in found.curve})
    for point in found.curve:
        assert point.mean_patch_length == float(
            plain_mean(with_threshold(scheme, parameter, point.threshold), documents)
        )


def test_a_sample_on_which_no_threshold_matters_is_told() -> None:
    arguments = (np.zeros(0, np.uint8), np.zeros(3, np.int64), np.ones(4, np.float16))
    with pytest.raises(InputError, match="every threshold gives 1 tokens a patch"):
        calibrate(EntropyScheme(threshold=0), "threshold", 3.0, *arguments)


@pytest.mark.parametrize("target", [0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_impossible_targets_are_refused(target: float) -> None:
    with pytest.raises(InputError, match="is impossible: a patch has at least one token"):
        calibrate(EntropyScheme(threshold=0.0), "threshold", target, np.zeros(3, np.uint8), OFFSETS, entropies_of(0, 5))


def test_calibration_needs_a_document_and_a_threshold() -> None:
    nothing = (np.empty(0, np.uint8), np.zeros(1, np.int64), np.empty(0, np.float16))
    with pytest.raises(InputError, match="no document to calibrate on"):
        calibrate(EntropyScheme(threshold=0.0), "threshold", 4.0, *nothing)
    some = (np.zeros(3, np.uint8), OFFSETS, entropies_of(0, 5))
    with pytest.raises(InputError, match="scheme entropy has no 'relative_threshold' to calibrate"):
        calibrate(EntropyScheme(threshold=0.0), "relative_threshold", 4.0, *some)


def shards_of(directory: Path, shards: list[list[bytes]]) -> ShardDirectory:
    entries = [
        write_shard(
            directory / f"shard-{number:05}.arrow",
            kind=ShardKind.BYTES,
            document_ids=[f"{number}-{row}" for row in range(len(documents))],
            contents=documents,
            sources=["test"] * len(documents),
            provenance={},
        )
        for number, documents in enumerate(shards)
    ]
    write_manifest(directory, Manifest(kind=ShardKind.BYTES, shards=tuple(entries)))
    return ShardDirectory.open(directory)


def test_the_sample_is_spread_evenly_and_cut_to_size(tmp_path: Path) -> None:
    shards = [[bytes([10 * number + row]) * 10 for row in range(10)] for number in range(3)]
    directory = shards_of(tmp_path, [*shards, []])
    sample = take_sample(directory, 60)
    assert [int(byte) for byte in sample.content[sample.content_offsets[:-1]]] == [2, 7, 12, 17, 22, 27]
    assert sample.statement["documents"] == 6
    assert sample.statement["bytes"] == sample.content.size == 60
    cut = take_sample(directory, 25)
    assert np.diff(cut.content_offsets).tolist() == [10, 10, 5]
    everything = take_sample(directory, 10_000)
    assert everything.content.tobytes() == b"".join(b"".join(documents) for documents in shards)
    assert everything.statement["documents"] == 30


def test_one_long_document_is_cut(tmp_path: Path) -> None:
    sample = take_sample(shards_of(tmp_path, [[bytes(5000)]]), 100)
    assert sample.content_offsets.tolist() == [0, 100]


def test_samples_that_cannot_be_taken(tmp_path: Path) -> None:
    directory = shards_of(tmp_path, [[]])
    with pytest.raises(InputError, match="holds no document to calibrate on"):
        take_sample(directory, 100)
    with pytest.raises(InputError, match="0 bytes; it needs at least 1"):
        take_sample(directory, 0)


def test_stored_entropies_give_the_sample_and_threshold_of_the_model(tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(99))
    patched = make_patched(tmp_path / "patched", EntropyScheme(threshold=1.0), seed=seed)
    source = ShardDirectory.open(tmp_path / "patched-bytes")
    scorer = HashScorer(seed)
    for size in (1, 700, 10**6):
        sample, stored = take_sample(source, size), take_sample(patched, size)
        assert sample.entropies is None
        assert stored.entropies is not None
        assert (stored.content.tobytes(), stored.statement) == (sample.content.tobytes(), sample.statement)
        nats = scorer.score(sample.content, sample.content_offsets)
        differs = np.flatnonzero(stored.entropies != nats)
        # A document that the sample's size cuts has another token after its last byte, whose entropy nothing uses.
        assert set(differs.tolist()) <= {stored.entropies.size - 1}
    known = stored.entropies
    assert known is not None
    for scheme, parameter in CASES:
        found = [
            calibrate(scheme, parameter, 4.0, sample.content, sample.content_offsets, entropies)
            for entropies in (nats, known)
        ]
        assert found[0] == found[1]


def test_a_directory_without_all_entropies_gives_none(tmp_path: Path) -> None:
    patched = make_patched(tmp_path / "patched", SpaceScheme(), scored=False)
    assert take_sample(patched, 100).entropies is None


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), points=st.integers(1, 40))
def test_the_outline_spans_all_thresholds_that_matter(seed: int, points: int) -> None:
    nats = entropies_of(seed, 60)
    scheme = EntropyScheme(threshold=0.0)
    found = calibrate(scheme, "threshold", 1.0, np.zeros(58, np.uint8), np.array([0, 58]), nats, outline_points=points)
    assert found.outline == tuple(sorted(found.outline, key=lambda point: point.threshold))
    for point in found.outline:
        assert point.mean_patch_length == float(plain_mean(EntropyScheme(threshold=point.threshold), [nats]))
    if points > 1:
        extremes = [plain_mean(EntropyScheme(threshold=value), [nats]) for value in (-60000.0, 60000.0)]
        assert found.outline[0].mean_patch_length == float(extremes[0])
        assert found.outline[-1].mean_patch_length == float(extremes[1])
