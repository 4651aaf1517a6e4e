"""Batch kernels against the plain rules, and the properties that hold for every scheme."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_patcher.plain import patch_plainly, schemes, scored_documents

from blt_data.errors import InputError
from blt_patcher import (
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
    boundaries,
    count_patches,
    kernels,
    patch_document,
    patch_documents,
)
from blt_patcher.thresholds import comparison, finite_float16
from blt_patcher.vectors import WORD

Scored = tuple[bytes, npt.NDArray[np.float16]]

ALL_SCHEMES: list[PatchScheme] = [
    EntropyScheme(threshold=1.9),
    EntropyScheme(threshold=2.5, max_patch_length=7),
    EntropyMonotonicScheme(relative_threshold=0.8),
    EntropyMonotonicScheme(relative_threshold=0.8, max_patch_length=5),
    EntropyCombinedScheme(threshold=1.0, relative_threshold=0.4),
    SpaceScheme(),
    SpaceScheme(max_patch_length=3),
    StaticScheme(patch_length=5),
    StaticScheme(patch_length=5, max_patch_length=3),
    ByteScheme(),
]


def join(documents: list[bytes], lead: bytes = b"") -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Documents end to end, after `lead` bytes that belong to none."""
    content = np.frombuffer(lead + b"".join(documents), dtype=np.uint8)
    return content, np.cumsum([len(lead), *(len(document) for document in documents)], dtype=np.int64)


@settings(max_examples=400)
@given(scheme=schemes, scored=scored_documents())
def test_kernels_follow_the_rules(scheme: PatchScheme, scored: Scored) -> None:
    content, entropies = scored
    lengths = patch_document(scheme, content, entropies)
    assert lengths.dtype == np.uint16
    assert lengths.tolist() == patch_plainly(scheme, content, entropies)
    assert lengths.sum() == len(content) + 2
    assert lengths[0] == 1
    assert lengths.min() >= 1
    assert lengths.max() <= scheme.length_limit


@settings(max_examples=150)
@given(scheme=schemes, scored=st.lists(scored_documents(), max_size=6), seed=st.integers(0, 2**32 - 1))
def test_a_document_is_patched_alone_whatever_its_neighbours(
    scheme: PatchScheme, scored: list[Scored], seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(scored))
    pack = [scored[index] for index in order]
    content, offsets = join([document for document, _ in pack], lead=b"xyz")
    entropies = np.concatenate([np.empty(0, np.float16), *(nats for _, nats in pack)])
    patched = patch_documents(scheme, content, offsets, entropies)
    assert patched.offsets[0] == 0
    assert patched.offsets[-1] == patched.lengths.size == count_patches(scheme, content, offsets, entropies)
    for place, (document, nats) in enumerate(pack):
        assert patched.document(place).tolist() == patch_document(scheme, document, nats).tolist()


@settings(max_examples=200)
@given(scheme=schemes, scored=scored_documents(), data=st.data())
def test_more_bytes_never_change_the_patches_of_a_prefix(
    scheme: PatchScheme, scored: Scored, data: st.DataObject
) -> None:
    content, entropies = scored
    cut = data.draw(st.integers(0, len(content)))
    # Starts up to that of the token after the prefix, which the prefix alone decides.
    whole = np.cumsum(patch_document(scheme, content, entropies))
    prefix = np.cumsum(patch_document(scheme, content[:cut], entropies[: cut + 2]))
    assert whole[whole <= cut + 1].tolist() == prefix[prefix <= cut + 1].tolist()


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_words_leave_no_seam(scheme: PatchScheme) -> None:
    rng = np.random.default_rng(7)
    edges = (WORD, 2 * WORD, kernels.BLOCK, 2 * kernels.BLOCK)
    sizes = [*(edge + near for edge in edges for near in range(-4, 3)), 700, 0, 1]
    documents = [rng.choice(np.frombuffer(b"abc 12.\n\xc3\xa9", np.uint8), size).tobytes() for size in sizes]
    entropies = [rng.exponential(1.4, size + 2).astype(np.float16) for size in sizes]
    content, offsets = join(documents)
    patched = patch_documents(scheme, content, offsets, np.concatenate(entropies))
    for index, document in enumerate(documents):
        assert patched.document(index).tolist() == patch_plainly(scheme, document, entropies[index])


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_threads_change_nothing(scheme: PatchScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundaries, "TOKENS_PER_THREAD", 50)
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 256, size, dtype=np.uint8).tobytes() for size in rng.integers(0, 90, 40)]
    content, offsets = join(documents)
    entropies = rng.exponential(1.4, content.size + 80).astype(np.float16)
    one = patch_documents(scheme, content, offsets, entropies, threads=1)
    for threads in (2, 3, 64):
        many = patch_documents(scheme, content, offsets, entropies, threads=threads)
        np.testing.assert_array_equal(many.lengths, one.lengths)
        np.testing.assert_array_equal(many.offsets, one.offsets)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_room_that_was_guessed_too_small_is_found_again(scheme: PatchScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(13)
    sizes = [200, *rng.integers(0, 90, 60).tolist(), 900]
    # The first documents hold few patches, so that what comes takes several times the room that they ask for.
    documents = [b"a" * 200] + [rng.choice(np.frombuffer(b"ab .", np.uint8), size).tobytes() for size in sizes[1:]]
    content, offsets = join(documents)
    entropies = np.concatenate([np.zeros(202), rng.exponential(3, content.size + 2 * len(sizes) - 202)])
    plain = patch_documents(scheme, content, offsets, entropies.astype(np.float16), threads=1)
    pieces = []
    joined = boundaries._joined

    def watched(found: list[npt.NDArray[np.uint16]]) -> npt.NDArray[np.uint16]:
        pieces.append(len(found))
        return joined(found)

    monkeypatch.setattr(boundaries, "_joined", watched)
    monkeypatch.setattr(boundaries, "PROBE_TOKENS", 150)
    guessed = patch_documents(scheme, content, offsets, entropies.astype(np.float16), threads=1)
    np.testing.assert_array_equal(guessed.lengths, plain.lengths)
    np.testing.assert_array_equal(guessed.offsets, plain.offsets)
    if scheme == EntropyScheme(threshold=1.9):
        assert pieces[0] > 1
    broken = entropies.astype(np.float16)
    broken[-3] = np.nan
    if scheme.needs_entropies:
        with pytest.raises(InputError, match=f"document {len(sizes) - 1} has an entropy"):
            patch_documents(scheme, content, offsets, broken, threads=1)


def test_patches_longer_than_uint16_are_split() -> None:
    content = bytes(200_000)
    quiet = np.zeros(200_002, np.float16)
    expected = [1, 65_535, 65_535, 65_535, 200_001 - 3 * 65_535]
    assert patch_document(EntropyScheme(threshold=1.0), content, quiet).tolist() == expected
    assert patch_document(StaticScheme(patch_length=10**30), content).tolist() == expected


def test_worked_examples() -> None:
    # Framed: BOS H i , EOS. "," is space-like and "i" is not, so EOS (after ",") starts a patch.
    assert patch_document(SpaceScheme(), b"Hi,").tolist() == [1, 3, 1]
    assert patch_document(SpaceScheme(), b"Hi,  you").tolist() == [1, 3, 6]
    # The three bytes of a kanji: the first is space-like but follows no text, the others are continuation bytes.
    assert patch_document(SpaceScheme(), "日本".encode()).tolist() == [1, 4, 3]
    nats = np.array([9, 1, 3, 2, 2.5, 9], np.float16)
    assert patch_document(EntropyScheme(threshold=2.0), b"abcd", nats).tolist() == [1, 2, 2, 1]
    assert patch_document(EntropyMonotonicScheme(relative_threshold=0.25), b"abcd", nats).tolist() == [1, 1, 1, 2, 1]
    combined = EntropyCombinedScheme(threshold=2.75, relative_threshold=0.25)
    assert patch_document(combined, b"abcd", nats).tolist() == [1, 1, 1, 3]
    assert patch_document(ByteScheme(), b"").tolist() == [1, 1]


def test_threshold_is_compared_exactly() -> None:
    # 1.335 is no float16: its neighbours are 1.3349609375 below and 1.3359375 above.
    below, above = np.float16(1.3349609375), np.float16(1.3359375)
    nats = np.array([0, below, above, below, 0], np.float16)
    assert patch_document(EntropyScheme(threshold=1.335), b"abc", nats).tolist() == [1, 2, 2]
    assert patch_document(EntropyScheme(threshold=float(below)), b"abc", nats).tolist() == [1, 2, 2]
    # A rise of 2⁻²⁴ on top of 4: float32 would lose it, float64 does not.
    tiny = np.array([0, 2**-24, 4, 0, 4, 0], np.float16)
    scheme = EntropyMonotonicScheme(relative_threshold=4 - 2**-25)
    assert patch_document(scheme, b"abcd", tiny).tolist() == [1, 1, 3, 1]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_entropies_that_are_not_finite_are_refused(broken: float) -> None:
    content, offsets = join([b"fine", b"broken"])
    for place in (6, 9, 13):
        nats = np.ones(14, np.float16)
        nats[place] = broken
        with pytest.raises(InputError, match="document 1 has an entropy that is not a finite number"):
            patch_documents(EntropyScheme(threshold=1.0), content, offsets, nats)
        assert patch_documents(SpaceScheme(), content, offsets, nats).lengths.sum() == 14


def test_arrays_that_do_not_fit_are_refused() -> None:
    content, offsets = join([b"abc"])
    scheme = EntropyScheme(threshold=1.0)
    with pytest.raises(InputError, match="needs entropies"):
        patch_documents(scheme, content, offsets)
    with pytest.raises(InputError, match="one value for each of the 5 framed tokens"):
        patch_documents(scheme, content, offsets, np.ones(4, np.float16))
    with pytest.raises(InputError, match="float64"):
        patch_documents(scheme, content, offsets, np.ones(5))
    with pytest.raises(InputError, match="content must be a uint8 vector"):
        patch_documents(ByteScheme(), content.astype(np.int16), offsets)
    with pytest.raises(InputError, match="content_offsets must rise"):
        patch_documents(ByteScheme(), content, np.array([0, 3, 2], np.int64))
    with pytest.raises(InputError, match="content_offsets must rise"):
        patch_documents(ByteScheme(), content, np.array([0, 4], np.int64))
    with pytest.raises(InputError, match="int64 vector"):
        patch_documents(ByteScheme(), content, np.empty(0, np.int64))
    with pytest.raises(InputError, match="threads is 0"):
        patch_documents(ByteScheme(), content, offsets, threads=0)


def test_no_documents() -> None:
    patched = patch_documents(SpaceScheme(), np.empty(0, np.uint8), np.zeros(1, np.int64))
    assert patched.lengths.size == 0
    assert patched.offsets.tolist() == [0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_integers_decide_like_rounded_numbers(dtype: type[np.floating[Any]]) -> None:
    values = finite_float16()
    assert values.size == 2 * 0x7C00 - 1
    assert bool(np.all(np.diff(values.astype(np.float64)) > 0))
    rng = np.random.default_rng(19)
    exact = values.astype(np.float64)
    picks = rng.choice(values.size - 1, 300)
    nats = np.concatenate([values, -values[values == 0]]).astype(dtype)
    if dtype is np.float32:
        # Between neighbours, at ties and next to them; all that still rounds to a finite number.
        middles = ((exact[:-1] + exact[1:]) / 2).astype(np.float32)
        beside = [np.nextafter(middles, np.float32(sign * np.inf)) for sign in (-1, 1)]
        edge = np.nextafter(np.float32(65520), np.float32(0))
        nats = np.concatenate([nats, middles, *beside, [edge, -edge]]).astype(np.float32)
    rounded = nats.astype(np.float16).astype(np.float64)
    for threshold in [*exact[picks], *(exact[picks] + exact[picks + 1]) / 2, 0.0, -0.0, 1e-12, -1e-12, 1e300, -1e300]:
        flip, key = comparison(float(threshold), 8 * nats.itemsize)
        patterns = nats.view(f"i{nats.itemsize}") ^ flip
        np.testing.assert_array_equal(patterns > key, rounded > threshold)
