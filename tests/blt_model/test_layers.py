"""Rotary positions and normalisation."""

import math

import pytest
import torch

from blt_model.layers import RMSNorm, document_positions, rotary_tables, rotate


@pytest.mark.parametrize("position", [0, 1, 511, 1_000_003, 50_000_000])
def test_rotary_angles_stay_exact_far_into_a_document(position: int) -> None:
    cosine, sine = rotary_tables(torch.tensor([position]), 8, 10_000.0)
    for pair in range(4):
        angle = position * 10_000.0 ** (-2 * pair / 8)
        assert float(cosine[0, 0, pair]) == pytest.approx(math.cos(angle), abs=1e-7)
        assert float(sine[0, 0, pair]) == pytest.approx(math.sin(angle), abs=1e-7)


def test_rotation_turns_neighbouring_pairs() -> None:
    torch.manual_seed(0)
    heads = torch.randn(5, 3, 8, dtype=torch.float64)
    cosine, sine = rotary_tables(torch.arange(5), 8, 100.0)
    turned = torch.view_as_complex(heads.view(5, 3, 4, 2)) * torch.complex(cosine.double(), sine.double())
    torch.testing.assert_close(rotate(heads, cosine, sine), torch.view_as_real(turned).flatten(-2))


def test_positions_count_from_each_document() -> None:
    offsets = torch.tensor([0, 3, 3, 4, 6, 6], dtype=torch.int32)
    assert document_positions(offsets, 6).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_keeps_the_dtype_and_follows_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 16).to(dtype)
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.to(dtype).double()
    result = norm(x)
    assert result.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
