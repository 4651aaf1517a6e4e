"""The Triton kernels at both ends of a training step against torch's operations: on CUDA, or interpreted by Triton."""

from typing import Any

import pytest
import torch
from tests.blt_model.generation_oracle import fresh_seed
from tests.blt_model.triton_runs import CUDA, DEVICE, need_kernels, run_interpreted, runs_interpreted

from blt_model import cross_entropy_and_z_sum
from blt_model.config import HashEmbeddingConfig
from blt_model.hash_embedding import hash_rows

# The interpreter knows no bfloat16.
DTYPES = [torch.float32, torch.bfloat16 if CUDA else torch.float16]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh random numbers, and kernels wherever they can run."""
    need_kernels()
    torch.manual_seed(fresh_seed())
    monkeypatch.setattr("blt_model.hash_embedding.has_triton", lambda tensor: True)
    monkeypatch.setattr("blt_model.loss.takes_kernels", lambda tensor: tensor.dtype != torch.float64)


@runs_interpreted
def test_in_the_interpreter() -> None:
    """All other tests of this file, in a process whose Triton interprets."""
    run_interpreted(__file__)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"newest_first": True, "raw_bytes": True},
        {"ngram_sizes": (6, 1, 20), "num_functions": 11, "table_size": 97},
        {"newest_first": True, "ngram_sizes": (2,), "table_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [0, 1, 300])
def test_rows(options: dict[str, Any], length: int, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = HashEmbeddingConfig(**options)
    tokens = torch.randint(0, 260, (length,), device=DEVICE)
    positions = torch.arange(length, device=DEVICE) % 23
    found = hash_rows(tokens, positions, config)
    monkeypatch.setattr("blt_model.hash_embedding.has_triton", lambda tensor: False)
    assert torch.equal(found, hash_rows(tokens, positions, config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize(("length", "vocabulary"), [(1, 260), (50, 260), (9, 7), (0, 260)])
def test_loss(length: int, vocabulary: int, z_loss: float, dtype: torch.dtype, kernels: None) -> None:
    logits = (5 * torch.randn(length, vocabulary, device=DEVICE)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    targets = torch.randint(0, vocabulary, (length,), device=DEVICE)
    targets[length // 4 : length // 2] = -100
    found, wanted = (cross_entropy_and_z_sum(tensor, targets, z_loss) for tensor in (logits, exact))
    assert not found[1].requires_grad
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(3 * found[0], logits)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(3 * wanted[0], exact)[0], rtol=tolerance, atol=tolerance / 10
    )
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_and_z_sum(logits, targets, z_loss)[0], found[0])
