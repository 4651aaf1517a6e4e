"""Text to entropies to patches to logits: our road and that of transformers' Blt, with the same random weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.blt_model.transformers_map import blt_weights, byte_lm_weights, their_blt, their_patcher

from blt_data import frame
from blt_model import BLT, BLTConfig, ByteLM, ByteLMConfig, pack_documents, preset
from blt_patcher import EntropyScheme, patch_documents
from blt_patcher.entropies import score_documents

DOCUMENTS = [
    "A patch begins where the next byte is hard to guess; так бывает, 予測しにくいところで。\r\n\x00".encode(),
    b"x",
    b"",
    b"while True:\n    pass\n" * 9,
]


def far_from(threshold: float, entropies: npt.NDArray[np.float16]) -> float:
    """The middle of the widest gap between neighbouring entropies near a threshold: no rounding decides there."""
    values = np.unique(entropies.astype(np.float64))
    near = np.clip(np.searchsorted(values, threshold), 3, len(values) - 4)
    window = values[near - 3 : near + 4]
    gap = int(np.argmax(np.diff(window)))
    return float((window[gap] + window[gap + 1]) / 2)


@pytest.mark.parametrize("max_patch_length", [None, 5])
def test_entropies_patches_and_logits(max_patch_length: int | None) -> None:
    torch.manual_seed(3)
    lm_config = preset("entropy-debug", transformer={"window": 16})
    blt_config = preset("blt-debug", encoder={"window": 512}, decoder={"window": 512})
    assert isinstance(lm_config, ByteLMConfig)
    assert isinstance(blt_config, BLTConfig)
    patcher, theirs = their_patcher(lm_config), their_blt(blt_config)
    with torch.no_grad():
        # Fresh weights give nearly equal entropies; larger ones give something to tell apart.
        patcher.lm_head.weight.mul_(40)
    entropy_lm, ours = ByteLM(lm_config), BLT(blt_config)
    entropy_lm.load_state_dict(byte_lm_weights(patcher.state_dict(), lm_config))
    ours.load_state_dict(blt_weights(theirs.state_dict(), blt_config))

    content = np.frombuffer(b"".join(DOCUMENTS), np.uint8)
    offsets = np.cumsum([0, *map(len, DOCUMENTS)]).astype(np.int64)
    entropies = score_documents(entropy_lm, content, offsets, window_tokens=32)
    threshold = far_from(float(np.median(entropies)), entropies)
    scheme = EntropyScheme(threshold=threshold, max_patch_length=max_patch_length)
    patched = patch_documents(scheme, content, offsets, entropies)
    framed = [frame(document) for document in DOCUMENTS]
    patches = [patched.document(index) for index in range(len(DOCUMENTS))]
    batch, _ = pack_documents(framed, patches)
    assert batch.patch_offsets is not None
    with torch.no_grad():
        logits = ours(batch)
        place = 0
        for document, lengths in zip(framed, patches, strict=True):
            tokens = torch.from_numpy(document[None].astype(np.int64))
            _, expected, _ = patcher(tokens, patch_size=4, threshold=threshold, max_patch_length=max_patch_length)
            assert lengths.tolist() == [int(length) for length in expected[0] if length > 0]
            table = torch.from_numpy(lengths[None].astype(np.int64))
            their_logits = theirs(tokens[:, :-1], patch_lengths=table, use_cache=False).logits[0]
            part = logits[place : place + len(document) - 1]
            torch.testing.assert_close(part, their_logits, rtol=0, atol=1e-5 * float(their_logits.abs().max()))
            place += len(part)
    assert 1 < sum(map(len, framed)) / sum(map(len, patches)) < 20
