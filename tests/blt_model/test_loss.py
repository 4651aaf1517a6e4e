"""The chunked loss against torch's, forward and backward."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it

from blt_model import cross_entropy_and_z_sum, cross_entropy_sum, loss


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_equals_torch(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    torch.manual_seed(0)
    logits = (5 * torch.randn(23, 260, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 260, (23,))
    targets[3:9] = -100
    ours = cross_entropy_sum(logits, targets)
    theirs = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(3 * ours, logits), torch.autograd.grad(3 * theirs, logits), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_z_loss_against_float64(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    torch.manual_seed(0)
    reference = (5 * torch.randn(23, 260, dtype=torch.float64)).requires_grad_()
    logits = reference.detach().to(dtype).requires_grad_()
    targets = torch.randint(0, 260, (23,))
    targets[3:9] = -100
    kept = targets != -100
    plain = F.cross_entropy(reference, targets, reduction="sum")
    expected = plain + 0.03 * reference.logsumexp(-1)[kept].square().sum()
    ours, ours_plain = cross_entropy_and_z_sum(logits, targets, 0.03)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours_plain.double(), plain, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(3 * ours, logits)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(3 * expected, reference)[0], rtol=tolerance, atol=tolerance
    )
    assert not ours_plain.requires_grad


def test_sums_half_precision_logits_in_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4000, 260).bfloat16().requires_grad_()
    targets = torch.randint(0, 260, (4000,))
    ours = cross_entropy_sum(logits, targets)
    torch.testing.assert_close(
        ours.double(), F.cross_entropy(logits.double(), targets, reduction="sum"), rtol=1e-6, atol=0
    )
    (gradient,) = torch.autograd.grad(ours, logits)
    assert gradient.dtype == torch.bfloat16


def test_nothing_to_predict_is_zero() -> None:
    logits = torch.randn(3, 260, requires_grad=True)
    total = cross_entropy_sum(logits, torch.full((3,), -100))
    assert total.item() == 0
    assert not torch.autograd.grad(total, logits)[0].any()
