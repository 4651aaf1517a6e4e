"""Gradients of looked-up rows that are added in place, against autograd's own; and the kernels that add them."""

from types import ModuleType

import numpy as np
import pytest
import torch
from tests.blt_model.generation_oracle import fresh_seed
from tests.blt_model.triton_runs import DEVICE, compiles, need_kernels, run_interpreted, runs_interpreted
from torch import Tensor

from blt_model import BLT, BLTConfig, pack_documents, preset
from blt_model.config import HashEmbeddingConfig
from blt_model.hash_embedding import HashEmbedding
from blt_model.loss import cross_entropy_sum
from blt_model.packed import PackedBatch
from blt_model.row_gradients import add_rows

CONFIGS = {
    "plain": HashEmbeddingConfig(table_size=61),
    "few rows": HashEmbeddingConfig(table_size=3, num_functions=2),
    "partial ones left out": HashEmbeddingConfig(table_size=17, omit_partial=True, num_functions=3),
}


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def kernels() -> ModuleType:
    need_kernels()
    from blt_model import row_kernels as module

    return module


@runs_interpreted
def test_in_the_interpreter() -> None:
    """The kernel tests of this file, in a process whose Triton interprets."""
    run_interpreted(__file__, "-k", "kernel")


@compiles
@pytest.mark.parametrize("is_weighted", [False, True])
def test_compiles_for_hopper(is_weighted: bool) -> None:
    """The interpreter takes programs that the compiler refuses; the compiler needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from blt_model import row_kernels

    integers = {"keys": "*i64", "order": "*i64", "starts": "*i32", "ends": "*i32"}
    values = {
        "ROWS": 6,
        "DIM": 1024,
        "WEIGHTED": is_weighted,
        "SUM": triton.language.float32,
        "BLOCK": 1024,
        "CHUNK": 32,
    }
    for kernel in (row_kernels._add_chunks, row_kernels._add_long_runs):
        types = {name: "constexpr" if name in values else integers.get(name, "*fp32") for name in kernel.arg_names}
        fixed = {(kernel.arg_names.index(name),): value for name, value in values.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=fixed)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


def expected(total: Tensor, rows: Tensor, values: Tensor, weights: Tensor | None) -> Tensor:
    """The sums in float64."""
    result = total.double().clone()
    for column in range(rows.shape[1]):
        part = values.double() if weights is None else values.double() * weights[:, column, None].double()
        result.index_add_(0, rows[:, column], part)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [40, 1100])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_kernels_add_rows(kernels: ModuleType, is_weighted: bool, width: int, dtype: torch.dtype, seed: int) -> None:
    """Runs of one occurrence, of just a chunk, of a chunk and one more, and of many chunks; rows that nobody reads."""
    generator = torch.Generator().manual_seed(seed)
    chunk = kernels.CHUNK
    counts = [1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk, 5 * chunk + 7, 0, 0, 1]
    rows = torch.repeat_interleave(torch.tensor(counts))
    rows = torch.cat([rows, torch.full((-len(rows) % 3,), 5)])
    rows = rows[torch.randperm(len(rows), generator=generator)].view(-1, 3).to(DEVICE)
    values = torch.randn(len(rows), width, generator=generator, dtype=dtype).to(DEVICE)
    weights = torch.randn(rows.shape, generator=generator, dtype=dtype).to(DEVICE) if is_weighted else None
    total = torch.randn(len(counts), width, generator=generator, dtype=dtype).to(DEVICE)
    before, wanted = total.clone(), expected(total, rows, values, weights)
    kernels.add_rows(total, rows, values, weights)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-9)
    assert torch.equal(total[7:9], before[7:9])
    again = before.clone()
    kernels.add_rows(again, rows, values, weights)
    assert torch.equal(total, again)


def test_kernels_take_random_rows_and_none(kernels: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    total = torch.zeros(50, 24, device=DEVICE)
    rows = torch.distributions.Exponential(0.2).sample((200, 2)).long().clamp_(max=49).to(DEVICE)
    values = torch.ones(1, 1, device=DEVICE).expand(200, 24)
    wanted = expected(total, rows, values, None)
    kernels.add_rows(total, rows, values, None)
    torch.testing.assert_close(total.double(), wanted)
    kernels.add_rows(total, rows[:0], values[:0], None)
    torch.testing.assert_close(total.double(), wanted)


def ragged(seed: int) -> tuple[Tensor, Tensor]:
    """Ids and positions of documents of several lengths, with many repeats."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (5,), generator=generator).tolist()
    tokens = torch.randint(4, 8, (sum(lengths),), generator=generator)
    return tokens.to(DEVICE), torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_those_of_autograd(name: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    plain = HashEmbedding(CONFIGS[name], 16).to(DEVICE, dtype)
    torch.nn.init.normal_(plain.weight)
    placed = HashEmbedding(CONFIGS[name], 16).to(DEVICE, dtype)
    placed.load_state_dict(plain.state_dict())
    placed.accumulates_in_place = True
    for step in range(2):
        storage = None
        for batch in range(3):
            tokens, positions = ragged(seed + 3 * step + batch)
            upstream = torch.randn(len(tokens), 16, device=DEVICE, dtype=dtype)
            results = [module(tokens, positions) for module in (plain, placed)]
            assert torch.equal(*results)
            for result in results:
                result.backward(upstream)
            assert plain.weight.grad is not None
            assert placed.weight.grad is not None
            # The same memory all the time: no second gradient is made.
            storage = storage or placed.weight.grad.data_ptr()
            assert placed.weight.grad.data_ptr() == storage
            torch.testing.assert_close(placed.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-4)
        for module in (plain, placed):
            module.zero_grad(set_to_none=True)


def test_no_gradient_of_the_tables_size_is_made() -> None:
    module = HashEmbedding(HashEmbeddingConfig(table_size=50_000), 64).to(DEVICE)
    torch.nn.init.zeros_(module.weight)
    module.accumulates_in_place = True
    tokens, positions = ragged(0)
    module(tokens, positions).sum().backward()
    result = module(tokens, positions).sum()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result.backward()
    size = module.weight.numel() * module.weight.element_size()
    assert all(event.self_cpu_memory_usage < size / 10 for event in profile.key_averages())
    assert module.weight.grad is not None
    assert module.weight.grad.sum() == 2 * 6 * 64 * len(tokens)


def test_by_default_autograd_gives_the_gradient() -> None:
    module = HashEmbedding(HashEmbeddingConfig(table_size=61), 16).double().to(DEVICE)
    torch.nn.init.normal_(module.weight)
    tokens, positions = ragged(0)
    (gradient,) = torch.autograd.grad(module(tokens, positions).square().sum(), [module.weight])
    assert module.weight.grad is None
    assert gradient.norm() > 0


def test_a_frozen_table_stays_without_gradient() -> None:
    module = HashEmbedding(HashEmbeddingConfig(table_size=61), 16).to(DEVICE)
    torch.nn.init.normal_(module.weight)
    module.accumulates_in_place = True
    module.weight.requires_grad_(False)
    assert not module(*ragged(0)).requires_grad
    module.weight.requires_grad_(True)
    with torch.no_grad():
        assert not module(*ragged(0)).requires_grad
    assert module.weight.grad is None


def packed(seed: int) -> tuple[PackedBatch, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    texts = [
        torch.randint(4, 40, (int(length),), generator=generator).numpy()
        for length in torch.randint(3, 30, (4,), generator=generator)
    ]
    batch, targets = pack_documents(texts, [np.ones(len(text), dtype=np.int64) for text in texts])
    return batch.to(DEVICE), targets.to(DEVICE)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_whole_models(backend: str | None, seed: int) -> None:
    """All gradients of a model, also compiled as a whole, over two micro batches."""
    config = preset("blt-debug", hash_embedding={"table_size": 61})
    assert isinstance(config, BLTConfig)
    torch.manual_seed(seed)
    plain, placed = (BLT(config).to(DEVICE) for _ in range(2))
    placed.load_state_dict(plain.state_dict())
    assert placed.encoder.hash_embedding is not None
    placed.encoder.hash_embedding.accumulates_in_place = True
    if backend is not None:
        plain.compile(backend=backend)
        placed.compile(backend=backend)
    for index in range(2):
        batch, targets = packed(seed + index)
        for model in (plain, placed):
            cross_entropy_sum(model(batch), targets).backward()  # type: ignore[no-untyped-call]
    for (name, one), other in zip(plain.named_parameters(), placed.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_rows_are_added_on_the_device(seed: int) -> None:
    torch.manual_seed(seed)
    total, values = torch.randn(9, 8, device=DEVICE), torch.randn(30, 8, device=DEVICE)
    rows, weights = torch.randint(0, 9, (30, 4), device=DEVICE), torch.randn(30, 4, device=DEVICE)
    wanted = expected(total, rows, values, weights)
    add_rows(total, rows, values, weights)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
