"""Attention backends against softmax attention with a full mask in float64, forward and backward."""

import pytest
import torch
from torch import Tensor

from blt_model.attention import AttentionBackend, attend, plan_attention, resolve_backend
from blt_model.errors import ModelError

SDPA, VARLEN, FLEX, TRITON = (AttentionBackend(name) for name in ("sdpa", "varlen", "flex", "triton"))
OFFSETS = {
    "one document": [0, 75],
    "many": [0, 1, 2, 20, 52, 53, 75],
    "empty ones at the end": [0, 40, 75, 75, 75],
}


def reference(query: Tensor, key: Tensor, value: Tensor, offsets: list[int], window: int | None, valid: int) -> Tensor:
    """One dense mask, one document and one pair of positions at a time."""
    num_tokens, carried = len(query), len(key) - len(query)
    document = [d for d in range(len(offsets) - 1) for _ in range(offsets[d], offsets[d + 1])]
    allowed = torch.zeros(num_tokens, carried + num_tokens, dtype=torch.bool)
    for i in range(num_tokens):
        for j in range(-carried, i + 1):
            same = document[i] == document[j] if j >= 0 else document[i] == 0 and j >= -valid
            allowed[i, carried + j] = same and (window is None or i - j < window)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("ihe,jhe->hij", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhe->ihe", weights, value)


def inputs(carried: int, kv_heads: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(75, 4, 16), (carried + 75, kv_heads, 16), (carried + 75, kv_heads, 16), (75, 4, 16)]
    query, key, value, gradient = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return query, key, value, gradient


def compare(
    backend: AttentionBackend,
    offsets: list[int],
    window: int | None,
    *,
    carried: int = 0,
    valid: int = 0,
    kv_heads: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
    backward: bool = True,
) -> None:
    query, key, value, gradient = inputs(carried, kv_heads, seed=len(offsets))
    leaves = [tensor.to(dtype).double().requires_grad_() for tensor in (query, key, value)]
    expected = reference(leaves[0], leaves[1], leaves[2], offsets, window, valid)
    expected_gradients = torch.autograd.grad(expected, leaves, gradient)
    ours = [leaf.detach().to(device, dtype).requires_grad_() for leaf in leaves]
    plan = plan_attention(
        torch.tensor(offsets, dtype=torch.int32, device=device),
        75,
        window=window,
        backend=backend,
        carried=carried,
        carried_valid=torch.tensor(valid, device=device),
    )
    result = attend(ours[0], ours[1], ours[2], plan)
    assert result.dtype == dtype
    torch.testing.assert_close(result.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    if backward:
        gradients = torch.autograd.grad(result, ours, gradient.to(device, dtype))
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(actual.cpu().double(), wanted, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
@pytest.mark.parametrize("window", [None, 1, 2, 16, 33, 74, 75, 300])
def test_sdpa_equals_the_reference(offsets: list[int], window: int | None) -> None:
    compare(SDPA, offsets, window)


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
@pytest.mark.parametrize(("window", "valid"), [(16, 0), (16, 15), (16, 4), (40, 39), (100, 7), (2, 1)])
def test_sdpa_reads_what_is_carried(offsets: list[int], window: int, valid: int) -> None:
    compare(SDPA, offsets, window, carried=window - 1, valid=valid)


@pytest.mark.parametrize("window", [None, 16])
def test_sdpa_shares_key_heads(window: int | None) -> None:
    compare(SDPA, OFFSETS["many"], window, kv_heads=2)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_sdpa_in_lower_precision(window: int | None, dtype: torch.dtype, tolerance: float) -> None:
    compare(SDPA, OFFSETS["many"], window, dtype=dtype, tolerance=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention runs on CUDA")
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
@pytest.mark.parametrize("window", [None, 1, 16, 33, 300])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_varlen_equals_the_reference(offsets: list[int], window: int | None, kv_heads: int) -> None:
    compare(VARLEN, offsets, window, kv_heads=kv_heads, device="cuda", dtype=torch.bfloat16, tolerance=3e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention runs on CUDA")
@pytest.mark.parametrize(("window", "valid"), [(16, 0), (16, 15), (16, 4), (40, 39), (100, 7)])
def test_varlen_reads_what_is_carried(window: int, valid: int) -> None:
    compare(
        VARLEN,
        OFFSETS["many"],
        window,
        carried=window - 1,
        valid=valid,
        device="cuda",
        dtype=torch.bfloat16,
        tolerance=3e-2,
        backward=False,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention runs on CUDA")
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
@pytest.mark.parametrize("window", [None, 16, 300])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-5)])
def test_flex_equals_the_reference(
    offsets: list[int], window: int | None, kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    # Each case is a shape of its own to torch, which would stop compiling at the ninth.
    torch.compiler.reset()
    compare(FLEX, offsets, window, kv_heads=kv_heads, device="cuda", dtype=dtype, tolerance=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention runs on CUDA")
@pytest.mark.parametrize(("window", "valid"), [(16, 0), (16, 15), (16, 4), (40, 39), (100, 7)])
def test_flex_reads_what_is_carried(window: int, valid: int) -> None:
    torch.compiler.reset()
    half = torch.bfloat16
    compare(FLEX, OFFSETS["many"], window, carried=window - 1, valid=valid, device="cuda", dtype=half, tolerance=3e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton compiles for CUDA")
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS.keys())
@pytest.mark.parametrize("window", [None, 1, 16, 300])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-5)])
def test_triton_equals_the_reference(
    offsets: list[int], window: int | None, kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    compare(TRITON, offsets, window, kv_heads=kv_heads, device="cuda", dtype=dtype, tolerance=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton compiles for CUDA")
@pytest.mark.parametrize(("window", "valid"), [(16, 0), (16, 15), (16, 4), (40, 39), (100, 7)])
def test_triton_reads_what_is_carried(window: int, valid: int) -> None:
    half = torch.bfloat16
    compare(TRITON, OFFSETS["many"], window, carried=window - 1, valid=valid, device="cuda", dtype=half, tolerance=3e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sdpa_on_cuda_equals_the_reference(window: int | None, kv_heads: int) -> None:
    compare(SDPA, OFFSETS["many"], window, kv_heads=kv_heads, device="cuda", dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("window", [16, None])
def test_memory_is_linear_in_tokens(window: int | None) -> None:
    """Twice the documents take twice the places (of masks and rectangles), not four times."""

    def places(num_documents: int) -> int:
        offsets = torch.arange(num_documents + 1, dtype=torch.int32) * 50
        carried = 0 if window is None else window - 1
        plan = plan_attention(offsets, 50 * num_documents, window=window, backend=SDPA, carried=carried)
        if plan.mask is not None:
            return plan.mask.numel()
        assert plan.rectangles
        return sum(rectangle.count * rectangle.length for rectangle in plan.rectangles)

    assert places(64) == 2 * places(32)


def test_backend_is_picked_by_device_and_dtype() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_backend("auto", cpu, torch.bfloat16) is SDPA
    assert resolve_backend("auto", cuda, torch.float32) is SDPA
    # Where there is no CUDA device, varlen attention is not even loaded.
    assert resolve_backend("auto", cuda, torch.bfloat16) is (VARLEN if torch.cuda.device_count() else SDPA)
    assert resolve_backend("sdpa", cuda, torch.bfloat16) is SDPA
    with pytest.raises(ModelError, match="varlen needs float16 or bfloat16 on CUDA"):
        resolve_backend("varlen", cpu, torch.bfloat16)
    with pytest.raises(ModelError, match="choose one of auto, varlen, triton, flex, sdpa"):
        resolve_backend("flash", cpu, torch.bfloat16)
