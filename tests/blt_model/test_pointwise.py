"""The kernels between a block's products against plain operations: on CUDA, elsewhere by Triton's interpreter."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from tests.blt_model.generation_oracle import fresh_seed
from tests.blt_model.triton_runs import CUDA, DEVICE, need_kernels, run_interpreted, runs_interpreted
from torch import Tensor

from blt_model import pointwise
from blt_model.layers import rotary_tables, rotate

# The interpreter knows no bfloat16.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(fresh_seed())


@pytest.fixture
def kernels() -> ModuleType:
    need_kernels()
    from blt_model import pointwise_kernels

    return pointwise_kernels


@runs_interpreted
def test_in_the_interpreter() -> None:
    """All other tests of this file, in a process whose Triton interprets."""
    run_interpreted(__file__)


def assert_close(found: Tensor | None, wanted: Tensor | None) -> None:
    assert found is not None
    assert wanted is not None
    assert found.shape == wanted.shape
    scale = max(float(wanted.abs().max()), 1e-6) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=TOLERANCE[found.dtype] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "count"), [(0, 8), (1, 1), (3, 40), (5, 1030)])
def test_swiglu(kernels: ModuleType, dtype: torch.dtype, rows: int, count: int) -> None:
    gate_value = torch.randn(rows, 2 * count, device=DEVICE).to(dtype).requires_grad_()
    upstream = torch.randn(rows, count, device=DEVICE).to(dtype)
    wide = gate_value.detach().double().requires_grad_()
    gate, value = wide.chunk(2, dim=-1)
    wanted = F.silu(gate) * value
    found = pointwise.swiglu(gate_value)
    assert found.dtype == dtype
    assert_close(found, wanted)
    torch.autograd.backward(found, upstream)
    torch.autograd.backward(wanted, upstream.double())
    assert_close(gate_value.grad, wide.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "carried", "heads", "kv_heads", "width"), [
    (1, 0, 1, 1, 16), (37, 0, 4, 4, 16), (33, 5, 6, 2, 32), (70, 64, 12, 12, 64),
])  # fmt: skip
def test_heads(
    kernels: ModuleType, dtype: torch.dtype, length: int, carried: int, heads: int, kv_heads: int, width: int
) -> None:
    flat = torch.randn(length, (heads + 2 * kv_heads) * width, device=DEVICE).to(dtype).requires_grad_()
    positions = torch.randint(0, 5_000, (length,), device=DEVICE)
    cosine, sine = rotary_tables(positions, width, 10_000.0)
    carry = None
    if carried:
        before = torch.randn(2, carried, kv_heads, width, device=DEVICE).to(dtype)
        carry = before[0], before[1]
    wide = flat.detach().double().requires_grad_()
    query, key, value = torch.split(wide.view(length, heads + 2 * kv_heads, width), [heads, kv_heads, kv_heads], dim=1)
    query, key = rotate(query, cosine.double(), sine.double()), rotate(key, cosine.double(), sine.double())
    if carry is not None:
        key, value = torch.cat([carry[0].double(), key]), torch.cat([carry[1].double(), value])
    wanted = query, key, value
    found = pointwise.split_heads(flat, cosine, sine, (heads, kv_heads), carry)
    for ours, reference in zip(found, wanted, strict=True):
        assert ours.is_contiguous()
        assert ours.dtype == dtype
        assert_close(ours, reference)
    upstream = [torch.randn(tensor.shape, device=DEVICE).to(dtype) for tensor in found]
    # One of them as a transposed view, as a backend may give it.
    upstream[0] = upstream[0].transpose(0, 1).contiguous().transpose(0, 1)
    torch.autograd.backward(found, upstream)
    torch.autograd.backward(wanted, [tensor.double() for tensor in upstream])
    assert_close(flat.grad, wide.grad)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_operations_are_what_torch_expects() -> None:
    flat = torch.randn(40, 3 * 4 * 16, device=DEVICE, requires_grad=True)
    cosine, sine = rotary_tables(torch.arange(40, device=DEVICE), 16, 10_000.0)
    torch.library.opcheck(torch.ops.blt_model.split_heads, (flat, cosine, sine, 4, 4, None, None))
    torch.library.opcheck(torch.ops.blt_model.swiglu, (flat,))
