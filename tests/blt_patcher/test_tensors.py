"""Patches of tensors and of datasets: read in place, padded as `transformers`' Blt takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.blt_model.transformers_map import their_blt, their_patcher
from tests.blt_patcher.plain import patch_plainly
from transformers.models.blt.modeling_blt import BltPatcher, process_patch_lengths

from blt_data import frame
from blt_data.errors import InputError
from blt_model import BLTConfig, ByteLMConfig, preset
from blt_patcher import (
    ByteScheme,
    EntropyCombinedScheme,
    EntropyMonotonicScheme,
    EntropyScheme,
    PatchScheme,
    SpaceScheme,
    StaticScheme,
    patch_documents,
    patch_lengths,
)
from blt_patcher.tensors import padded_patch_lengths


def random_rows(rng: np.random.Generator, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [B, T], entropies float32 [B, T] (float16 numbers) and lengths [B] of rows `[BOS, bytes…]`."""
    width = max(sizes, default=0)
    ids = np.zeros((len(sizes), width), np.int64)
    for row, size in enumerate(sizes):
        text = rng.choice(np.frombuffer(b"abc 12.\n\xc3\xa9", np.uint8), size)
        ids[row, :size] = frame(text)[:size]
    nats = rng.exponential(1.4, ids.shape).astype(np.float16).astype(np.float32)
    return torch.from_numpy(ids), torch.from_numpy(nats), torch.tensor(sizes)


def starts_of(lengths: list[int], tokens: int) -> list[int]:
    """Where patches begin, up to token `tokens`, which is the one after a row of so many."""
    return [start for start in np.cumsum([0, *lengths[:-1]]).tolist() if start <= tokens]


def their_starts(nats: torch.Tensor, threshold: float, limit: int | None) -> list[int]:
    """The same by the patcher of transformers, which writes a patch after the last token as one of no token."""
    lengths = BltPatcher.patch_lengths_from_entropies(  # type: ignore[no-untyped-call]  # its signature has no types
        entropies=nats[None], sequence_length=nats.numel(), patch_size=4, threshold=threshold
    )
    split = process_patch_lengths(lengths, limit)[0].tolist()
    if limit is None:
        return starts_of(split, nats.numel())
    # Splitting drops the patch of no token; a patch as long as may be ends in any case.
    open_length = split[-1]
    after = bool(nats[-1] > threshold) or nats.numel() == 1 or open_length == limit
    return starts_of([*split, 0] if after else split, nats.numel())


@pytest.mark.parametrize("limit", [None, 3])
def test_equal_to_the_patcher_of_transformers(limit: int | None) -> None:
    rng = np.random.default_rng(29)
    for sizes in ([1], [2, 1, 3], [65, 1, 64, 63, 128, 129], [300, 17, 2]):
        ids, nats, lengths = random_rows(rng, sizes)
        for threshold in (-1.0, 0.7, 1.3354, 9.0):
            scheme = EntropyScheme(threshold=threshold, max_patch_length=limit)
            padded = padded_patch_lengths(scheme, entropies=nats, lengths=lengths)
            assert padded.dtype == torch.int64
            assert padded.sum(1).tolist() == [max(sizes) + 1] * len(sizes)
            for row, size in enumerate(sizes):
                filled = int((padded[row] > 0).sum())
                assert starts_of(padded[row, :filled].tolist(), size) == their_starts(
                    nats[row, :size].double(), threshold, limit
                )
                assert not bool(padded[row, filled:].any())
            assert padded.shape[1] == int((padded > 0).sum(1).max())
            same = padded_patch_lengths(scheme, entropies=nats.half(), input_ids=ids, lengths=lengths)
            assert torch.equal(padded, same)


def test_the_model_of_transformers_takes_them() -> None:
    torch.manual_seed(5)
    lm_config = preset("entropy-debug", transformer={"window": 512})
    blt_config = preset("blt-debug", encoder={"window": 512}, decoder={"window": 512})
    assert isinstance(lm_config, ByteLMConfig)
    assert isinstance(blt_config, BLTConfig)
    patcher, model = their_patcher(lm_config), their_blt(blt_config)
    with torch.no_grad():
        patcher.lm_head.weight.mul_(40)
    sizes = [40, 1, 23, 2]
    ids, _, lengths = random_rows(np.random.default_rng(2), sizes)
    with torch.no_grad():
        scored = [patcher(ids[row : row + 1, :size], patch_size=4, threshold=1.0)[0] for row, size in enumerate(sizes)]
        values = torch.cat([row.flatten() for row in scored]).sort().values
        # In the widest gap between entropies around the median, so that rounding to float16 decides nothing.
        middle = values[len(values) // 2 - 8 : len(values) // 2 + 8]
        gap = int(middle.diff().argmax())
        threshold = float(middle[gap : gap + 2].mean())
        nats = torch.zeros(ids.shape)
        for row, size in enumerate(sizes):
            nats[row, :size] = scored[row]
        ours = padded_patch_lengths(EntropyScheme(threshold=threshold), entropies=nats, lengths=lengths)
        together = model(ids, patch_lengths=ours, use_cache=False).logits
        for row, size in enumerate(sizes):
            alone = ids[row : row + 1, :size]
            theirs = patcher(alone, patch_size=4, threshold=threshold)[1]
            filled = int((ours[row] > 0).sum())
            assert starts_of(ours[row, :filled].tolist(), size) == starts_of(theirs[0].tolist(), size)
            expected = model(alone, patch_lengths=theirs, use_cache=False).logits[0]
            scale = float(expected.abs().max())
            torch.testing.assert_close(together[row, :size], expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "scheme",
    [
        EntropyScheme(threshold=1.2, max_patch_length=9),
        EntropyMonotonicScheme(relative_threshold=0.4),
        EntropyCombinedScheme(threshold=1.0, relative_threshold=0.2),
        SpaceScheme(),
        SpaceScheme(max_patch_length=4),
        StaticScheme(patch_length=3),
        ByteScheme(),
    ],
    ids=str,
)
def test_rows_are_patched_like_documents(scheme: PatchScheme) -> None:
    rng = np.random.default_rng(31)
    ids, nats, lengths = random_rows(rng, [9, 1, 70, 33, 2])
    ids[3, 32] = 2  # this row ends with EOS
    padded = padded_patch_lengths(scheme, entropies=nats, input_ids=ids, lengths=lengths)
    for row, size in enumerate(lengths.tolist()):
        tokens = ids[row, :size].tolist()
        body = bytes(token - 4 for token in tokens[1:] if token >= 4)
        scores = np.pad(nats[row, :size].numpy().astype(np.float16), (0, 1))[: len(body) + 2]
        filled = int((padded[row] > 0).sum())
        # To a row without EOS the token after it is its EOS; after an EOS comes nothing that would matter.
        expected = patch_plainly(scheme, body, scores)
        found = padded[row, :filled].tolist()
        assert starts_of(found, len(body) + 1) == starts_of(expected, len(body) + 1)
        assert sum(found) == ids.shape[1] + 1


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([np.float16, np.float32]))
def test_arrays_and_tensors_alike_without_a_copy(seed: int, dtype: type[np.float16] | type[np.float32]) -> None:
    rng = np.random.default_rng(seed)
    nats = rng.exponential(1.4, 200).astype(dtype)
    offsets = np.array([0, 0, 1, 90, 200])
    scheme = EntropyScheme(threshold=float(rng.uniform(0, 3)))
    ours = patch_lengths(nats, offsets, scheme)
    tensors = patch_lengths(torch.from_numpy(nats), torch.from_numpy(offsets), scheme)
    np.testing.assert_array_equal(ours.lengths, tensors.lengths)
    for index in range(4):
        part = nats[offsets[index] : offsets[index + 1]]
        starts = [j for j in range(part.size) if j < 2 or np.float64(np.float16(part[j - 1])) > scheme.threshold]
        assert ours.document(index).tolist() == np.diff([*starts, part.size]).tolist()
    np.testing.assert_array_equal(patch_lengths(nats, offsets[3:], scheme).lengths, ours.document(3))


def test_tensors_are_read_where_they_lie() -> None:
    content = torch.tensor(list(b"two words"), dtype=torch.uint8)
    offsets = torch.tensor([0, content.numel()])
    patched = patch_documents(SpaceScheme(), content, offsets)
    assert patched.lengths.tolist() == [1, 4, 6]
    assert torch.from_numpy(patched.lengths).dtype == torch.uint16
    with pytest.raises(InputError, match=r"entropies cannot be read as a NumPy array .* detach it"):
        patch_lengths(torch.ones(3, requires_grad=True), offsets[:1], EntropyScheme(threshold=1.0))
    with pytest.raises(InputError, match="entropies must be a NumPy array or a tensor, not list"):
        patch_lengths([1.0], offsets, EntropyScheme(threshold=1.0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scheme space reads bytes"):
        patch_lengths(torch.ones(3), offsets, SpaceScheme())
    with pytest.raises(InputError, match="offsets must rise from 0 or more to at most the 3 entropies"):
        patch_lengths(torch.ones(3), offsets, EntropyScheme(threshold=1.0))


def test_every_floating_type_is_rounded_to_float16() -> None:
    exact = torch.tensor([[3.0, 1.3301, 1.3299, 0.5]], dtype=torch.float64)
    scheme = EntropyScheme(threshold=1.33)
    # 1.3301 and 1.3299 both round to 1.330078125 in float16, above the threshold; in bfloat16 to 1.328125, below.
    assert padded_patch_lengths(scheme, entropies=exact).tolist() == [[1, 1, 1, 2]]
    assert padded_patch_lengths(scheme, entropies=exact.float().requires_grad_()).tolist() == [[1, 1, 1, 2]]
    assert padded_patch_lengths(scheme, entropies=exact.bfloat16()).tolist() == [[1, 4]]


def test_rows_that_cannot_be_patched_are_refused() -> None:
    nats, ids = torch.ones(2, 5), torch.tensor([[1, 100, 101, 2, 0], [1, 100, 100, 100, 2]])
    entropy = EntropyScheme(threshold=1.0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "nothing to patch"),
        ({"input_ids": ids}, "scheme entropy needs entropies"),
        ({"entropies": nats[0]}, r"must be \[rows, tokens\], both alike, not \[5\]"),
        ({"entropies": nats, "input_ids": ids[:, 1:]}, r"not \[2, 5\] and \[2, 4\]"),
        ({"entropies": nats, "lengths": torch.tensor([5, 6])}, "lengths must be 1 to 5, the tokens of a row; found 5"),
        ({"entropies": nats, "lengths": torch.tensor([5.0, 5.0])}, "lengths must be 2 whole numbers"),
        ({"entropies": nats * torch.nan}, "document 0 has an entropy that is not a finite number"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            padded_patch_lengths(entropy, **arguments)
    with pytest.raises(InputError, match="scheme space reads bytes; give input_ids"):
        padded_patch_lengths(SpaceScheme(), entropies=nats)
    with pytest.raises(InputError, match="row 0 of input_ids is no framed document"):
        padded_patch_lengths(SpaceScheme(), input_ids=ids)
    assert padded_patch_lengths(SpaceScheme(), input_ids=ids, lengths=torch.tensor([4, 5])).sum(1).tolist() == [6, 6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_come_back_to_the_gpu() -> None:
    nats = torch.rand(3, 100) * 4
    scheme = EntropyScheme(threshold=2.0)
    there = padded_patch_lengths(scheme, entropies=nats.cuda())
    assert there.is_cuda
    assert torch.equal(there.cpu(), padded_patch_lengths(scheme, entropies=nats))
    with pytest.raises(InputError, match=r"lies on a GPU; copy it with \.cpu\(\)"):
        patch_lengths(nats.cuda()[0], np.array([0, 100]), scheme)
