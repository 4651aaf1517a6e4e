"""Segment operations against loops over patches in float64, forward and backward."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blt_model.segments import Segments, bytes_read_patches, patches_read_bytes, segment_max, segment_mean

# Patches of one byte, of many, and empty ones at the end.
OFFSETS = [0, 1, 4, 5, 17, 24, 30, 30, 30]
RUNS = list(itertools.pairwise(OFFSETS))
SEGMENTS = Segments.from_offsets(torch.tensor(OFFSETS, dtype=torch.int32), 30)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def joined(key: Tensor, value: Tensor) -> Tensor:
    return torch.stack([key, value], -3)


def assert_same(ours: Callable[..., Tensor], loop: Callable[..., Tensor], *leaves: Tensor) -> None:
    actual, expected = ours(*leaves), loop(*leaves)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for one, other in zip(
        torch.autograd.grad(actual, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_maximum() -> None:
    def loop(x: Tensor) -> Tensor:
        return torch.stack([x[a:b].amax(0) if b > a else x.new_zeros(5) for a, b in RUNS])

    assert_same(lambda x: segment_max(x, SEGMENTS), loop, random(30, 5))


def test_maximum_shares_the_gradient_of_ties_equally() -> None:
    x = torch.tensor([[1.0], [3.0], [3.0], [2.0], [5.0]], requires_grad=True)
    segments = Segments.from_offsets(torch.tensor([0, 4, 5], dtype=torch.int32), 5)
    (gradient,) = torch.autograd.grad(segment_max(x, segments), x, torch.tensor([[4.0], [1.0]]))
    assert gradient.flatten().tolist() == [0.0, 2.0, 2.0, 0.0, 1.0]


def test_mean() -> None:
    def loop(x: Tensor) -> Tensor:
        return torch.stack([x[a:b].mean(0) if b > a else x.new_zeros(5) for a, b in RUNS])

    assert_same(lambda x: segment_mean(x, SEGMENTS), loop, random(30, 5))


@pytest.mark.parametrize("k", [1, 3])
def test_patches_read_their_bytes(k: int) -> None:
    def loop(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = []
        for patch, (a, b) in enumerate(RUNS):
            weights = (torch.einsum("khe,the->hkt", query[patch], key[a:b]) * 4**-0.5).softmax(-1)
            rows.append(torch.einsum("hkt,the->khe", weights, value[a:b]))
        return torch.stack(rows)

    leaves = random(len(RUNS), k, 2, 4), random(30, 2, 4), random(30, 2, 4)
    assert_same(lambda q, key, v: patches_read_bytes(q, joined(key, v), SEGMENTS), loop, *leaves)


@pytest.mark.parametrize("k", [1, 3])
def test_bytes_read_one_patch(k: int) -> None:
    def loop(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = []
        for token, patch in enumerate(SEGMENTS.ids.tolist()):
            weights = (torch.einsum("he,khe->hk", query[token], key[patch]) * 4**-0.5).softmax(-1)
            rows.append(torch.einsum("hk,khe->he", weights, value[patch]))
        return torch.stack(rows)

    leaves = random(30, 2, 4), random(len(RUNS), k, 2, 4), random(len(RUNS), k, 2, 4)
    assert_same(lambda q, key, v: bytes_read_patches(q, joined(key, v), SEGMENTS), loop, *leaves)


def test_weights_do_not_overflow() -> None:
    """Scores of thousands, as an untrained or diverging model may give."""
    query, key, value = (1e3 * random(*shape) for shape in ((len(RUNS), 2, 2, 4), (30, 2, 4), (30, 2, 4)))
    assert patches_read_bytes(query.float(), joined(key, value).float(), SEGMENTS).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_sums_on_cuda_come_out_the_same_every_time_and_as_on_the_cpu() -> None:
    offsets = torch.cat([torch.arange(0, 9000, 7), torch.tensor([9000, 9000])]).int()
    segments = Segments.from_offsets(offsets.cuda(), 9000)
    count = segments.count
    leaves = [random(*shape).float().detach() for shape in ((9000, 2, 16), (count, 3, 2, 16), (count, 3, 2, 16))]
    gradient = random(9000, 2, 16).float().detach()

    def gradients(device: str) -> tuple[Tensor, ...]:
        query, key, value = (leaf.to(device).requires_grad_() for leaf in leaves)
        runs = Segments.from_offsets(offsets.to(device), 9000)
        return torch.autograd.grad(
            bytes_read_patches(query, joined(key, value), runs), (query, key, value), gradient.to(device)
        )

    first = gradients("cuda")
    for one, again, cpu in zip(first, gradients("cuda"), gradients("cpu"), strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one.cpu(), cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 40, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_pieces_of_any_size_give_the_same(piece: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, read = random(len(RUNS), k, 2, 4), (random(30, 2, 4), random(31, 2, 4)[1:])
    others = random(30, 2, 4), random(len(RUNS), k, 2, 4), random(len(RUNS) + 1, k, 2, 4)[1:]

    def results() -> list[Tensor]:
        outputs = [
            patches_read_bytes(patches, joined(*read), SEGMENTS),
            bytes_read_patches(others[0], joined(*others[1:]), SEGMENTS),
        ]
        total = sum(output.square().sum() for output in outputs)
        assert isinstance(total, Tensor)
        return [*outputs, *torch.autograd.grad(total, [patches, *read, *others])]

    expected = results()
    monkeypatch.setattr("blt_model.fused.PIECE", piece)
    for one, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(one, other)
