"""The `entropy` scheme against the patcher of `transformers`: the same entropies in, the same patches out.

That patcher reads entropies as a [batch, tokens] tensor over the framed document, forces tokens 0 and 1 and then
compares every later entropy with the threshold. It also reads the entropy after EOS: where that exceeds the threshold
it opens a patch of no token, which is left out here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.blt.modeling_blt import BltPatcher, process_patch_lengths

from blt_patcher import EntropyScheme, patch_document


def transformers_lengths(entropies: torch.Tensor, threshold: float, limit: int | None) -> list[int]:
    lengths = BltPatcher.patch_lengths_from_entropies(  # type: ignore[no-untyped-call]  # its signature has no types
        entropies=entropies[None], sequence_length=entropies.numel(), patch_size=4, threshold=threshold
    )
    return [int(length) for length in process_patch_lengths(lengths, limit)[0] if length > 0]


@pytest.mark.parametrize("limit", [None, 1, 3, 8])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1.335442066192627, 1.5, 3.0, 9.0])
def test_patches_equal_those_of_transformers(threshold: float, limit: int | None) -> None:
    rng = np.random.default_rng(11)
    for size in (0, 1, 2, 3, 17, 700):
        nats = rng.exponential(1.4, size + 2).astype(np.float16)
        # Values equal to a threshold of 1.5: both compare strictly.
        nats[::5] = np.float16(1.5)
        scheme = EntropyScheme(threshold=threshold, max_patch_length=limit)
        ours = patch_document(scheme, rng.integers(0, 256, size, dtype=np.uint8), nats).tolist()
        # float64 holds both the float16 values and the threshold, so both sides decide on the same numbers.
        assert ours == transformers_lengths(torch.from_numpy(nats).double(), threshold, limit)
