"""The chunked loss against torch's, forward and backward."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it

from blt_model import cross_entropy_sum, loss


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
