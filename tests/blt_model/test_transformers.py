"""Logits, entropies and gradients equal those of transformers' Blt classes with the same random weights.

Every document of a pack is compared with transformers' result on that document alone: its batches pad. transformers
gets the patch lengths of the framed document, so that, as in training, the last position reads the last complete patch.
"""

from typing import Any

import numpy as np
import pytest
import torch
from tests.blt_model.samples import Array, framed_document, random_patches, repetitive_document
from tests.blt_model.transformers_map import blt_weights, byte_lm_weights, their_blt, their_patcher
from torch import Tensor
from torch.nn.functional import cross_entropy

from blt_model import BLT, BLTConfig, ByteLM, ByteLMConfig, next_byte_entropy, pack_documents, preset

CONFIGS: dict[str, dict[str, Any]] = {
    "released shape": {},
    "k 3, projected": {"cross_attention": {"k": 3}},
    "deep encoder": {"encoder": {"num_layers": 2}, "cross_attention": {"encoder_placement": "last"}},
    "decoder first": {"cross_attention": {"decoder_placement": "first"}},
    "two hash functions": {"hash_embedding": {"num_functions": 2, "ngram_sizes": [2, 5], "table_size": 97}},
    "other bases and norms": {
        "encoder": {"rope_theta": 10_000.0, "norm_eps": 1e-3},
        "latent": {"rope_theta": 777.0, "num_kv_heads": 1},
        "decoder": {"ffn_dim": 48, "norm_eps": 1e-4},
    },
}


def sample() -> tuple[list[Array], list[Array]]:
    rng = np.random.default_rng(0)
    rows = [framed_document(rng, n) for n in (0, 1, 2, 33, 150)] + [repetitive_document(rng, 80)]
    return rows, [random_patches(rng, len(row)) for row in rows]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("overrides", [{}, {"window": 512, "num_kv_heads": 1, "rope_theta": 10_000.0}])
def test_entropy_model(attention: str, overrides: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = preset("entropy-debug", transformer=overrides)
    assert isinstance(config, ByteLMConfig)
    theirs, ours = their_patcher(config, attention), ByteLM(config)
    ours.load_state_dict(byte_lm_weights(theirs.state_dict(), config))
    rows, _ = sample()
    with torch.no_grad():
        logits = ours(pack_documents(rows)[0])
        place = 0
        for row in rows:
            entropies, _, expected = theirs(torch.from_numpy(row[None, :-1]))
            part = logits[place : place + len(row) - 1]
            assert_close(part, expected[0])
            assert_close(next_byte_entropy(part), entropies[0])
            place += len(part)


def pair(overrides: dict[str, Any], attention: str = "eager") -> tuple[Any, BLT]:
    torch.manual_seed(0)
    config = preset("blt-debug", **overrides)
    assert isinstance(config, BLTConfig)
    theirs = their_blt(
        config,
        encoder_all=config.encoder.num_layers > 1,
        decoder_all=config.cross_attention.decoder_placement == "all",
        attention=attention,
    )
    ours = BLT(config)
    ours.load_state_dict(blt_weights(theirs.state_dict(), config))
    return theirs, ours


def their_logits(theirs: Any, row: Array, patches: Array) -> Tensor:
    tokens, lengths = torch.from_numpy(row[None, :-1]), torch.from_numpy(patches[None])
    logits: Tensor = theirs(tokens, patch_lengths=lengths, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_blt_logits(attention: str, overrides: dict[str, Any]) -> None:
    theirs, ours = pair(overrides, attention)
    rows, lengths = sample()
    with torch.no_grad():
        logits = ours(pack_documents(rows, lengths, num_tokens=320, num_documents=10, num_patches=250)[0])
        place = 0
        for row, patches in zip(rows, lengths, strict=True):
            part = logits[place : place + len(row) - 1]
            assert_close(part, their_logits(theirs, row, patches))
            place += len(part)


def test_patches_of_one_and_of_the_whole_document() -> None:
    theirs, ours = pair({})
    row = framed_document(np.random.default_rng(5), 60)
    for patches in (np.ones(62, dtype=np.int64), np.array([1, 61]), np.array([1, 60, 1])):
        with torch.no_grad():
            assert_close(ours(pack_documents([row], [patches])[0]), their_logits(theirs, row, patches))


@pytest.mark.parametrize("overrides", [CONFIGS["released shape"], CONFIGS["k 3, projected"]], ids=["released", "k 3"])
def test_blt_gradients(overrides: dict[str, Any]) -> None:
    """The gradient of every parameter, summed over the documents of a pack."""
    theirs, ours = pair(overrides)
    rows, lengths = sample()
    batch, targets = pack_documents(rows, lengths)
    torch.autograd.backward(cross_entropy(ours(batch), targets, reduction="sum"))
    for row, patches in zip(rows, lengths, strict=True):
        logits = their_logits(theirs, row, patches)
        torch.autograd.backward(cross_entropy(logits, torch.from_numpy(row[1:]), reduction="sum"))
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(theirs.parameters()))
    expected = blt_weights(gradients, ours.config)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-4 * scale, msg=name)
