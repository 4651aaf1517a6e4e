"""Normalisation and SwiGLU against their formulas written plainly in float64, cut into pieces of few rows."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model import fused

Function = Callable[..., Tensor]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def plain_swiglu(x: Tensor) -> Tensor:
    gate, value = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return gate / (1 + (-gate).exp()) * value


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return fused.rms_norm(x, weight, 1e-3)


CASES = [(norm, plain_norm, [(50, 12), (12,)]), (fused.swiglu, plain_swiglu, [(50, 24)])]
NAMES = ["norm", "swiglu"]


@pytest.mark.parametrize(("ours", "plain", "shapes"), CASES, ids=NAMES)
@pytest.mark.parametrize("piece", [1, 100, 1 << 16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_equals_the_formula(
    ours: Function,
    plain: Function,
    shapes: list[tuple[int, ...]],
    piece: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "PIECE", piece)
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    actual, expected = ours(*leaves), plain(*wide)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn(expected.shape, dtype=torch.float64)
    got = torch.autograd.grad(actual, leaves, gradient.to(dtype))
    for one, other in zip(got, torch.autograd.grad(expected, wide, gradient), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=20 * tolerance)


def test_gradients_pass_torchs_own_check() -> None:
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 6), (6,)))
    assert torch.autograd.gradcheck(norm, (x, weight))
    assert torch.autograd.gradcheck(fused.swiglu, (x,))


@pytest.mark.parametrize("shape", [(0, 8), (3, 4, 8)])
def test_norm_takes_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(norm(x, torch.ones(8)), F.rms_norm(x, (8,), eps=1e-3))


def test_swiglu_keeps_only_its_input_for_backward() -> None:
    """Plain autograd would keep silu(gate) too."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = torch.randn(50, 24, requires_grad=True)
        fused.swiglu(x)
    assert sum(tensor.numel() for tensor in kept) == x.numel()
