"""FlexAttention: its masks against the plain rule and against torch's own maker of them; when it refuses."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from blt_model.attention import AttentionBackend, attend, plan_attention, resolve_backend
from blt_model.errors import ModelError
from blt_model.flex_backend import attend_flex, block_mask, first_keys
from blt_model.packed import segment_of

# Tokens, carried keys, window, offsets.
CASES = {
    "whole documents": (700, 0, None, [0, 3, 300, 700]),
    "window, empty documents": (700, 0, 200, [0, 3, 600, 700, 700]),
    "carried": (1000, 199, 200, [0, 500, 1000]),
    "carried, whole blocks": (513, 128, 128, [0, 130, 513]),
    "small window": (256, 0, 16, [0, 256]),
    "less than a block": (20, 0, None, [0, 7, 20]),
}


def offsets_of(offsets: list[int], carried: int, valid: int) -> tuple[Tensor, Tensor]:
    queries = torch.tensor(offsets, dtype=torch.int32)
    keys = queries + carried
    keys[0] -= valid
    return queries, keys


@pytest.mark.parametrize(("num_tokens", "carried", "window", "offsets"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_mask(num_tokens: int, carried: int, window: int | None, offsets: list[int], share: float) -> None:
    valid = int(share * carried)
    mask = block_mask(first_keys(*offsets_of(offsets, carried, valid), num_tokens, carried, window), carried)
    dense = create_mask(mask.mask_mod, 1, 1, num_tokens, carried + num_tokens, device="cpu")[0, 0]
    query = torch.arange(num_tokens)[:, None]
    key = torch.arange(-carried, num_tokens)
    document = segment_of(torch.tensor(offsets), num_tokens)
    # A carried key belongs to the first document, if to any.
    of_key = torch.cat([torch.where(key[:carried] >= -valid, 0, -1), document])
    expected = (document[:, None] == of_key) & (key <= query)
    if window is not None:
        expected &= query - key < window
    assert torch.equal(dense, expected)
    wanted = create_block_mask(mask.mask_mod, 1, 1, num_tokens, carried + num_tokens, device="cpu")
    assert mask.shape == wanted.shape
    assert blocks(mask) == blocks(wanted)


def blocks(mask: BlockMask) -> list[list[set[int]]]:
    """Which blocks are looked at in part and in full, by queries and by keys."""
    pairs = [
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
        (mask.q_num_blocks, mask.q_indices),
        (mask.full_q_num_blocks, mask.full_q_indices),
    ]
    result = []
    for counts, indices in pairs:
        assert counts is not None
        assert indices is not None
        rows = zip(counts.flatten().tolist(), indices.flatten(0, 2).tolist(), strict=True)
        result.append([set(row[:count]) for count, row in rows])
    return result


def test_refuses_what_it_cannot_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(ModelError, match="compiles a CUDA kernel, and got cpu; use backend sdpa"):
        resolve_backend("flex", torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError, match=r"got torch\.float64"):
        resolve_backend("flex", cuda, torch.float64)
    monkeypatch.setattr("blt_model.flex_backend.HAS_TRITON", False)
    with pytest.raises(ModelError, match="needs the compiler triton"):
        resolve_backend("flex", cuda, torch.bfloat16)


def test_never_runs_uncompiled() -> None:
    """Whatever keeps torch from compiling: the function refuses to run as it is."""
    heads = torch.randn(20, 2, 16)
    mask = block_mask(first_keys(*offsets_of([0, 20], 0, 0), 20, 0, None), 0)
    torch.compiler.set_stance("force_eager")
    try:
        with pytest.raises(ModelError, match="flex was not compiled"):
            attend_flex(heads, heads, heads, mask)
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention runs on CUDA")
def test_other_documents_of_one_capacity_compile_nothing() -> None:
    query, key, value = (
        torch.randn(500, 4, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    for index, offsets in enumerate([[0, 100, 500, 500], [0, 3, 4, 500], [0, 500, 500, 500]]):
        tensor = torch.tensor(offsets, dtype=torch.int32, device="cuda")
        plan = plan_attention(tensor, 500, window=64, backend=AttentionBackend.FLEX)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            torch.autograd.backward(attend(query, key, value, plan).sum())
