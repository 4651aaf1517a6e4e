"""The BLT: packing, padding, options, and what information passes where."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.blt_model.samples import Array, framed_document, random_patches
from torch import Tensor

from blt_model import BLT, BLTConfig, ModelError, PackedBatch, cross_entropy_sum, pack_documents, preset

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no hashes": {"hash_embedding": {"ngram_sizes": []}},
    "paper's hashes": {
        "hash_embedding": {"newest_first": True, "raw_bytes": True, "omit_partial": True, "average": True}
    },
    "mean pooling": {"cross_attention": {"pooling": "mean"}},
    "single residual": {"cross_attention": {"double_residual": False}},
    "k 3": {"cross_attention": {"k": 3}},
    "everywhere": {"encoder": {"num_layers": 3}, "cross_attention": {"encoder_placement": "all"}},
    "first": {"encoder": {"num_layers": 3}, "cross_attention": {"encoder_placement": "first"}},
    "decoder first": {"cross_attention": {"decoder_placement": "first"}},
    "decoder last": {"cross_attention": {"decoder_placement": "last"}},
    "own decoder": {"decoder": {"window": 3, "rope_theta": 100.0}},
    "latent window": {"latent": {"window": 4, "num_kv_heads": 1}},
}


def model(**overrides: Any) -> BLT:
    torch.manual_seed(0)
    config = preset("blt-debug", **overrides)
    assert isinstance(config, BLTConfig)
    return BLT(config).double()


def sample(seed: int = 0) -> tuple[list[Array], list[Array]]:
    rng = np.random.default_rng(seed)
    rows = [framed_document(rng, n) for n in (40, 0, 1, 90, 6)]
    return rows, [random_patches(rng, len(row)) for row in rows]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_packed_documents_equal_separate_ones(options: dict[str, Any]) -> None:
    blt = model(**options)
    rows, lengths = sample()
    packed, _ = pack_documents(rows, lengths, num_tokens=160, num_documents=9, num_patches=100)
    together = blt(packed)
    place = 0
    for row, patches in zip(rows, lengths, strict=True):
        alone = blt(pack_documents([row], [patches])[0])
        torch.testing.assert_close(together[place : place + len(alone)], alone)
        place += len(alone)


def test_every_option_changes_the_function() -> None:
    """Options that share all weights with the default give other logits from the same weights."""
    batch, _ = pack_documents(*sample())
    base = model()
    logits = base(batch)
    sharing = ("paper's hashes", "mean pooling", "single residual", "own decoder")
    hash_options = OPTIONS["paper's hashes"]["hash_embedding"]
    singles = [{"hash_embedding": {key: value}} for key, value in hash_options.items()]
    for options in [*(OPTIONS[name] for name in sharing), *singles]:
        other = model(**options)
        other.load_state_dict(base.state_dict())
        assert (other(batch) - logits).abs().max() > 1e-4, options


def test_padding_changes_neither_logits_nor_gradients() -> None:
    rows, lengths = sample()
    results: list[tuple[Tensor, list[Tensor]]] = []
    for capacities in ({}, {"num_tokens": 200, "num_documents": 12, "num_patches": 150}):
        blt = model()
        batch, targets = pack_documents(rows, lengths, **capacities)
        loss = cross_entropy_sum(blt(batch), targets)
        results.append((loss, list(torch.autograd.grad(loss, list(blt.parameters())))))
    torch.testing.assert_close(results[0], results[1])


def byte_gradients(blt: BLT, batch: PackedBatch, position: int) -> Tensor:
    """Which positions' embeddings the logits at one position depend on."""
    embedding = blt.encoder.embedding(batch.tokens).detach().requires_grad_()
    handle = blt.encoder.embedding.register_forward_hook(lambda *_: embedding)
    try:
        (gradient,) = torch.autograd.grad(blt(batch)[position].sum(), embedding)
    finally:
        handle.remove()
    touched: Tensor = gradient.abs().sum(1) > 0
    return touched


@pytest.mark.parametrize("options", [OPTIONS["default"], OPTIONS["everywhere"]], ids=["default", "everywhere"])
def test_gradients_stay_inside_the_document_and_before_the_position(options: dict[str, Any]) -> None:
    blt = model(**options)
    batch, _ = pack_documents(*sample())
    offsets = batch.document_offsets.tolist()
    for document, position in ((0, 0), (0, 40), (1, 41), (2, 43), (3, 100), (4, len(batch.tokens) - 1)):
        touched = byte_gradients(blt, batch, position)
        start = offsets[document]
        assert start <= position < offsets[document + 1]
        assert not touched[:start].any()
        assert not touched[position + 1 :].any()
        # The latent transformer reaches back to the document's first byte.
        assert touched[start]
        assert touched[position]


@pytest.mark.parametrize("changed", [0, 5, 40, 41, 42, 60, 133])
def test_a_change_never_reaches_earlier_or_foreign_positions(changed: int) -> None:
    blt = model()
    batch, _ = pack_documents(*sample())
    tokens = batch.tokens.clone()
    tokens[changed] = tokens[changed] % 250 + 5
    moved = PackedBatch(tokens, batch.document_offsets, batch.patch_offsets, batch.decoder_patch)
    reached = (blt(batch) != blt(moved)).any(1)
    end = min(e for e in batch.document_offsets.tolist() if e > changed)
    assert not reached[:changed].any()
    assert not reached[end:].any()
    assert reached[changed]


def test_latent_output_is_read_only_when_its_patch_is_complete() -> None:
    """Where a later boundary falls changes nothing before it: patches of a prefix are those of the document."""
    blt = model()
    rng = np.random.default_rng(3)
    row = framed_document(rng, 30)
    one, _ = pack_documents([row], [np.array([1, 4, 5, 6, 16])])
    other, _ = pack_documents([row], [np.array([1, 4, 5, 2, 2, 2, 16])])
    same = (blt(one) == blt(other)).all(1)
    # Token 12 is the first whose patch differs, and position 11 predicts it.
    assert same[:11].all()
    assert not same[11:].any()


def test_runs_under_autocast_close_to_float32() -> None:
    blt = model().float()
    batch, targets = pack_documents(*sample())
    exact = blt(batch).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = blt(batch)
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.15 * float(exact.std()))
    torch.autograd.backward(cross_entropy_sum(rough, targets))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in blt.parameters())


def test_training_lowers_the_loss() -> None:
    blt = model().float()
    optimizer = torch.optim.AdamW(blt.parameters(), lr=3e-3)
    batch, targets = pack_documents(*sample())
    losses: list[float] = []
    for _ in range(12):
        loss = cross_entropy_sum(blt(batch), targets) / len(targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_initial_loss_is_near_uniform() -> None:
    """Fresh weights predict next to nothing, neither confidently wrong nor with inside knowledge."""
    batch, targets = pack_documents(*sample())
    nats = cross_entropy_sum(model()(batch), targets).item() / len(targets)
    assert np.log(260) - 0.1 < nats < np.log(260) + 1


def test_batch_without_patches_is_refused() -> None:
    batch, _ = pack_documents(sample()[0])
    with pytest.raises(ModelError, match="has no patches"):
        model()(batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_never_waits_for_the_gpu() -> None:
    blt = model().cuda().bfloat16()
    batch = pack_documents(*sample())[0].to("cuda")
    blt(batch).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        blt(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
