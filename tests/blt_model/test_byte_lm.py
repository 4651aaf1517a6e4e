"""The entropy model: packing, streaming, and what information passes where."""

import math

import numpy as np
import pytest
import torch
from tests.blt_model.samples import Array, framed_document
from tests.blt_model.streaming import stream

from blt_model import ByteLM, ByteLMConfig, ModelError, next_byte_entropy, pack_documents, preset


def model(**overrides: object) -> ByteLM:
    torch.manual_seed(0)
    config = preset("entropy-debug", **overrides)
    assert isinstance(config, ByteLMConfig)
    return ByteLM(config).double()


def documents(seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [framed_document(rng, n) for n in (0, 1, 30, 5, 100, 7)]


def test_packed_documents_equal_separate_ones() -> None:
    lm, rows = model(), documents()
    packed, _ = pack_documents(rows, num_tokens=160, num_documents=9)
    together = lm(packed)
    place = 0
    for document in rows:
        alone = lm(pack_documents([document])[0])
        torch.testing.assert_close(together[place : place + len(alone)], alone)
        place += len(alone)


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 5, 8, 9, 64, 1000])
def test_streaming_equals_whole_documents(window: int, length: int) -> None:
    lm, rows = model(transformer={"window": window, "num_kv_heads": 1}), documents()
    with torch.no_grad():
        whole = [lm(pack_documents([np.append(row, 0)])[0]) for row in rows]
        torch.testing.assert_close(stream(lm.stream, rows, length), torch.cat(whole))


@pytest.mark.parametrize("length", [70, 128, 300])
def test_streaming_with_a_key_more_than_attention_reaches(length: int) -> None:
    lm, rows = model(transformer={"window": 128}), [*documents(), framed_document(np.random.default_rng(1), 700)]
    assert lm.carried == lm.initial_state().keys.shape[1] == 128
    with torch.no_grad():
        whole = [lm(pack_documents([np.append(row, 0)])[0]) for row in rows]
        torch.testing.assert_close(stream(lm.stream, rows, length), torch.cat(whole))


def test_wide_logits_are_those_of_float32_under_autocast() -> None:
    lm = model().float()
    tokens, offsets = torch.tensor([1, 9, 2, 1, 8]), torch.tensor([0, 3, 5], dtype=torch.int32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trunk, _ = lm.stream_trunk(tokens, offsets)
        narrow, _ = lm.stream(tokens, offsets)
        wide = lm.wide_logits(trunk)
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    with torch.no_grad():
        expected = lm.head(lm.norm(trunk))
    torch.testing.assert_close(wide, expected, rtol=0, atol=0)
    assert (narrow.float() - wide).abs().max() > 0


def test_state_has_fixed_shapes_and_counts_its_document() -> None:
    lm = model()
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    _, first = lm.stream(torch.tensor([1, 9, 2, 1, 8]), offsets)
    _, second = lm.stream(torch.tensor([7, 6, 5, 4, 3, 9, 9, 9, 9]), torch.tensor([0, 9], dtype=torch.int32), first)
    assert (int(first.valid), int(first.position)) == (2, 2)
    assert (int(second.valid), int(second.position)) == (7, 11)
    assert first.keys.shape == second.keys.shape == lm.initial_state().keys.shape == (2, 7, 2, 16)


def test_empty_window_is_refused() -> None:
    with pytest.raises(ModelError, match="holds no token"):
        model().stream(torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("changed", [0, 31, 32, 60])
def test_a_change_reaches_only_later_tokens_of_its_document_within_reach(changed: int) -> None:
    lm, rows = model(), documents()
    batch, _ = pack_documents(rows)
    other = batch.tokens.clone()
    other[changed] = other[changed] % 250 + 5
    base = lm(batch)
    moved = lm(type(batch)(other, batch.document_offsets))
    reached = (base != moved).any(1)
    ends = batch.document_offsets.tolist()
    end = min(e for e in ends if e > changed)
    assert not reached[:changed].any()
    assert not reached[end:].any()
    # Two layers of window 8 reach 14 tokens ahead and no further.
    assert not reached[changed + 15 :].any()
    assert reached[changed : min(end, changed + 15)].all()


def test_gradients_stay_inside_the_document_and_before_the_position() -> None:
    lm, rows = model(), documents()
    batch, _ = pack_documents(rows)
    start, stop = batch.document_offsets[2:4].tolist()
    position = start + 10
    # One embedding row for each position shows where its gradient comes from.
    embedding = lm.embedding(batch.tokens).detach().requires_grad_()
    lm.embedding.register_forward_hook(lambda *_: embedding)
    (gradient,) = torch.autograd.grad(lm(batch)[position].sum(), embedding)
    touched = gradient.abs().sum(1) > 0
    assert touched[start : position + 1].all()
    assert touched.sum() == position + 1 - start
    assert stop > position + 1


def test_entropy_is_in_nats() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])) + 7
    expected = [0.5 * math.log(2) + 0.5 * math.log(4), math.log(3)]
    torch.testing.assert_close(next_byte_entropy(logits), torch.tensor(expected))
    assert next_byte_entropy(logits.bfloat16()).dtype == torch.float32


def test_runs_under_autocast_close_to_float32() -> None:
    lm = model().float()
    batch, _ = pack_documents(documents())
    exact = lm(batch).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = lm(batch)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.1 * float(exact.std()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_never_waits_for_the_gpu() -> None:
    lm = model().cuda().bfloat16()
    batch = pack_documents(documents())[0].to("cuda")
    lm(batch).sum().backward()
    with torch.no_grad():
        _, state = lm.stream(batch.tokens, batch.document_offsets)
        torch.cuda.set_sync_debug_mode("error")
        try:
            lm(batch)
            lm.stream(batch.tokens, batch.document_offsets, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
