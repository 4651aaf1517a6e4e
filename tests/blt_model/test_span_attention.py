"""Rotation and attention in one, in place, against the two one after the other; and compiled code around them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from blt_model import span_attention
from blt_model.attention import AttentionBackend, attend, plan_attention
from blt_model.config import TransformerConfig
from blt_model.layers import Block, SequenceLayout, document_positions, rotate

OFFSETS = {"one long": [0, 400], "ragged": [0, 1, 33, 200, 333, 400, 400], "after one token": [0, 1, 400]}


def layout(offsets: list[int], window: int | None, **sizes: Any) -> SequenceLayout:
    config = TransformerConfig(dim=16, num_layers=1, num_heads=2, window=window, **sizes)
    tensor = torch.tensor(offsets, dtype=torch.int32)
    plan = plan_attention(tensor, offsets[-1], window=window, backend=AttentionBackend.SDPA)
    return SequenceLayout.make(plan, document_positions(tensor, offsets[-1]), config)


def dense(query: Tensor, key: Tensor, value: Tensor, offsets: list[int], window: int | None) -> Tensor:
    place = torch.arange(offsets[-1])
    document = torch.bucketize(place, torch.tensor(offsets), right=True)
    distance = place[:, None] - place
    allowed = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("ihe,jhe->hij", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
@pytest.mark.parametrize("window", [None, 31, 32, 33, 130])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("call_tokens", [1, 64, 1024])
def test_equals_rotation_and_a_dense_mask(
    offsets: list[int], window: int | None, kv_heads: int, call_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the gradient that reaches rotated keys and values from elsewhere."""
    monkeypatch.setattr(span_attention, "CALL_TOKENS", call_tokens)
    shared, sizes = layout(offsets, window, num_kv_heads=kv_heads), [2, kv_heads, kv_heads]
    assert shared.plan.spans is not None
    assert shared.phases is not None
    width = (2 + 2 * kv_heads) * 8
    leaf = torch.randn(offsets[-1], width, dtype=torch.float64, requires_grad=True)
    actual, flat = span_attention.turn_and_attend(leaf * 1, shared.phases, kv_heads, shared.plan.spans)
    query, key, value = torch.split(leaf.view(len(leaf), -1, 8), sizes, dim=1)
    query, key = (rotate(heads, shared.cosine, shared.sine) for heads in (query, key))
    expected = dense(query, key, value, offsets, window)
    torch.testing.assert_close(actual, expected)
    turned = torch.cat([query, key, value], dim=1).flatten(1)
    torch.testing.assert_close(flat, turned)
    gradients = torch.randn(expected.shape, dtype=torch.float64), torch.randn(turned.shape, dtype=torch.float64)
    for weight in (0.0, 1.0):
        (one,) = torch.autograd.grad([actual, flat * weight], [leaf], gradients, retain_graph=True)
        (other,) = torch.autograd.grad([expected, turned * weight], [leaf], gradients, retain_graph=True)
        torch.testing.assert_close(one, other)


def test_gradients_pass_torchs_own_check() -> None:
    shared = layout([0, 3, 40], 8)
    assert shared.plan.spans is not None
    heads = [torch.randn(40, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, shared.plan), heads, fast_mode=True)


def test_heads_that_are_a_view_are_left_as_they_are() -> None:
    shared = layout([0, 200], None)
    assert shared.plan.spans is not None
    assert shared.phases is not None
    whole = torch.randn(200, 2, 48)
    before = whole.clone()
    span_attention.turn_and_attend(whole[:, 0], shared.phases, 2, shared.plan.spans)
    assert torch.equal(whole, before)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="torch 2.11 compiles again, on the CPU, for each number of documents",
)
def test_compiled_blocks_equal_eager_ones_and_compile_once() -> None:
    """Batches of one capacity and other documents reuse the code: what differs is not traced."""
    torch.manual_seed(0)
    block = Block(TransformerConfig(dim=16, num_layers=1, num_heads=2, window=32))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    compiled = torch.compile(block, backend="aot_eager", dynamic=False)
    x = torch.randn(400, 16)
    for index, offsets in enumerate(OFFSETS.values()):
        shared = layout([*offsets, *[400] * (7 - len(offsets))], 32)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            result = compiled(x, shared)
        torch.testing.assert_close(result, block(x, shared))
        results = [
            torch.autograd.grad(out.square().sum(), list(block.parameters())) for out in (result, block(x, shared))
        ]
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
