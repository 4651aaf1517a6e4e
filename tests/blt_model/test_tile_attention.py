"""Attention by our own Triton kernels against full masks in float64: on CUDA, elsewhere by Triton's interpreter."""

import itertools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.blt_model.generation_oracle import fresh_seed
from tests.blt_model.triton_runs import CUDA, DEVICE, need_kernels, run_interpreted, runs_interpreted
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from blt_model.attention import AttentionBackend, AttentionPlan, attend, plan_attention, resolve_backend
from blt_model.config import TransformerConfig
from blt_model.errors import ModelError
from blt_model.layers import Block, SequenceLayout, document_positions

# The interpreter knows no bfloat16.
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LONG = 700 if CUDA else 70
"""Tokens of a pack; the interpreter is slow."""


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def kernels() -> ModuleType:
    need_kernels()
    from blt_model import tile_kernels

    return tile_kernels


@pytest.fixture(params=[(False, False), (True, True)], ids=["three loops", "one loop, bulk copies"])
def small_tiles(kernels: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of few tokens, so that short packs have masked and unmasked ones."""
    options = dict(zip(("one_loop", "bulk"), request.param, strict=True)) | {"warps": 4, "stages": 2}
    wide, tall = (kernels.Tiles(queries=q, keys=k, **options) for q, k in ((16, 32), (32, 16)))
    plan = kernels.Plan(forward=tall, query_gradient=wide, key_gradient=tall)
    monkeypatch.setattr(kernels, "tiles_for", lambda width, dtype: plan)


@runs_interpreted
def test_in_the_interpreter() -> None:
    """All other tests of this file, in a process whose Triton interprets."""
    run_interpreted(__file__)


def error(ours: Tensor, reference: Tensor) -> float:
    wide = reference.detach().double()
    return float((ours.detach().double() - wide).norm() / wide.norm().clamp(min=1e-30))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def pieces(total: int, longest: int) -> Iterator[int]:
    """Lengths of documents: empty ones, single tokens, short and long ones; their sum is `total`."""
    while total:
        kind = int(torch.randint(4, ()))
        limit = (0, 1, 9, longest)[kind]
        length = min(total, limit if kind < 2 else int(torch.randint(1, limit + 1, ())))
        total -= length
        yield length
    yield 0


def dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with a mask [T, C + T], and log-sum-exps [H, T]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("ihe,jhe->hij", query, key) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.einsum("hij,jhe->ihe", scores.softmax(-1), value), scores.logsumexp(-1)


def allowed_pairs(lengths: list[int], carried: int, valid: int, window: int | None) -> Tensor:
    """bool [T, C + T]."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    # Carried keys are of the first document, if of any; where that has no token here nothing reads them.
    before = torch.where(torch.arange(carried) >= carried - valid, 0, -1)
    place = torch.arange(-carried, len(document))
    query = place[carried:, None]
    allowed = (document[:, None] == torch.cat([before, document])) & (place <= query)
    if window is not None:
        allowed &= query - place < window
    return allowed.to(DEVICE)


def pack(lengths: list[int], window: int | None, carried: int = 0, valid: int = 0) -> AttentionPlan:
    offsets = [0, *itertools.accumulate(lengths)]
    return plan_attention(
        torch.tensor(offsets, dtype=torch.int32, device=DEVICE),
        sum(lengths),
        window=window,
        backend=AttentionBackend.TRITON,
        carried=carried,
        carried_valid=torch.tensor(valid, device=DEVICE),
    )


def check(lengths: list[int], window: int | None, carried: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    """Result, log-sum-exps and gradients; query, key and value are views of what one product and carrying make."""
    total, heads = sum(lengths), 4
    valid = int(torch.randint(carried + 1, ()))
    flat = random(total, heads + 2 * kv_heads, width, dtype=dtype)
    carry = random(2, carried, kv_heads, width, dtype=dtype)
    upstream = random(heads, total, width, dtype=dtype).transpose(0, 1)
    plan, allowed = pack(lengths, window, carried, valid), allowed_pairs(lengths, carried, valid, window)

    def run(flat: Tensor, carry: Tensor, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        flat, carry = flat.requires_grad_(), carry.requires_grad_()
        query, key, value = torch.split(flat, [heads, kv_heads, kv_heads], dim=1)
        if carried:
            key, value = torch.cat([carry[0], key]), torch.cat([carry[1], value])
        result = function(query, key, value)
        leaves = [flat, carry] if carried else [flat]
        return [result, *torch.autograd.grad(result, leaves, upstream.to(result.dtype))]

    ours = run(flat.clone(), carry.clone(), lambda q, k, v: attend(q, k, v, plan))
    wanted = run(flat.double(), carry.double(), lambda q, k, v: dense(q, k, v, allowed)[0])
    assert ours[0].is_contiguous()
    for name, one, other in zip(("result", "gradient", "carried"), ours, wanted, strict=False):
        assert one.dtype == dtype
        assert error(one, other) < TOLERANCE[dtype], (name, lengths, window, carried, valid)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("window", "carried", "kv_heads"),
    [(None, 0, 4), (None, 0, 2), (1, 0, 4), (7, 0, 1), (50, 0, 2), (7, 6, 4), (48, 48, 2), (33, 32, 4), (500, 20, 4)],
)
def test_ragged_packs(window: int | None, carried: int, kv_heads: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    lengths = list(pieces(int(torch.randint(LONG // 2, LONG, ())), LONG // 2))
    check(lengths, window, carried, kv_heads, 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_widths(kernels: ModuleType, width: int, dtype: torch.dtype, seed: int) -> None:
    """With the tiles that every width has."""
    torch.manual_seed(seed)
    check([3, LONG // 3, LONG // 2], 40, 0, 2, width, dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32])
def test_one_document(length: int, seed: int) -> None:
    """No multiple of a tile, and just one; with the window of one token left of nothing but it."""
    torch.manual_seed(seed)
    check([length], None, 0, 4, 16, DTYPES[-1])
    check([length], 1, 3, 4, 16, DTYPES[-1])


def test_nothing(kernels: ModuleType) -> None:
    empty = torch.zeros(0, 2, 16, device=DEVICE, requires_grad=True)
    result = attend(empty, empty, empty, pack([0], None))
    assert result.shape == (0, 2, 16)
    result.sum().backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    assert empty.grad is not None


@pytest.mark.usefixtures("small_tiles")
def test_log_sum_exps_and_other_layouts(seed: int) -> None:
    """The second result, for inputs whose heads do not lie together, and an upstream gradient without memory."""
    torch.manual_seed(seed)
    lengths = [20, 0, 13]
    query, key, value = (random(33, 16, 2).transpose(1, 2) for _ in range(3))
    plan = pack(lengths, 9)
    assert plan.bounds is not None
    output, sums = torch.ops.blt_model.attend_tiles(query, key, value, plan.bounds.first, plan.bounds.ends)
    wanted, wanted_sums = dense(query.double(), key.double(), value.double(), allowed_pairs(lengths, 0, 0, 9))
    assert error(output, wanted) < TOLERANCE[torch.float32]
    assert error(sums, wanted_sums) < TOLERANCE[torch.float32]
    query.requires_grad_()
    attend(query, key, value, plan).sum().backward()  # type: ignore[no-untyped-call]
    exact = query.detach().double().requires_grad_()
    dense(exact, key.double(), value.double(), allowed_pairs(lengths, 0, 0, 9))[0].sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None
    assert exact.grad is not None
    assert error(query.grad, exact.grad) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("small_tiles")
def test_gradients_are_equal_to_the_bit(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = leaves = [random(40, 2, 16, dtype=DTYPES[0]).requires_grad_() for _ in range(3)]
    upstream = random(40, 2, 16, dtype=DTYPES[0])
    runs = [torch.autograd.grad(attend(query, key, value, pack([1, 30, 9], 12)), leaves, upstream) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def block_and_layout(window: int | None = 12) -> tuple[Block, Tensor, SequenceLayout]:
    config = TransformerConfig(dim=32, num_layers=1, num_heads=2, window=window)
    block = Block(config).to(DEVICE)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    lengths = [1, 25, 0, 14]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    layout = SequenceLayout.make(pack(lengths, window), document_positions(offsets, 40), config)
    return block, random(40, 32), layout


@pytest.mark.usefixtures("small_tiles")
def test_a_block_compiles_whole(seed: int) -> None:
    """Without a break, and to the same result and gradients."""
    torch.manual_seed(seed)
    block, x, layout = block_and_layout()
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="inductor" if CUDA else "aot_eager")
    found, wanted = (
        [y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))]
        for y in (function(x, layout) for function in (compiled, block))
    )
    limit = 1e-4 if CUDA else 1e-6
    assert all(error(one, other) < limit for one, other in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_checkpointing_keeps_the_result(kernels: ModuleType, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a policy keeps the operation's results, backward does not attend once more."""
    torch.manual_seed(seed)
    block, x, layout = block_and_layout()
    calls, forward = [], kernels.forward

    def counted(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        result: tuple[Tensor, Tensor] = forward(*arguments)
        return result

    monkeypatch.setattr(kernels, "forward", counted)

    def keep(_context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
        is_ours = operation is torch.ops.blt_model.attend_tiles.default
        return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(keep)  # type: ignore[no-untyped-call]

    wanted = torch.autograd.grad(block(x, layout).square().sum(), list(block.parameters()))
    result = checkpoint(block, x, layout, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(result.square().sum(), list(block.parameters()))
    assert len(calls) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ModelError, match="runs CUDA kernels, and got cpu; use backend sdpa"):
        resolve_backend("triton", cpu, torch.float32)
    with pytest.raises(ModelError, match=r"got torch\.float64"):
        resolve_backend("triton", cuda, torch.float64)
    heads = torch.zeros(5, 2, 24, device=DEVICE)
    with pytest.raises(ModelError, match="takes heads of 16, 32, 64, 128, 256 numbers, and got 24"):
        attend(heads, heads, heads, pack([5], None))
    monkeypatch.setattr("blt_model.tile_attention.HAS_TRITON", True)
    with pytest.raises(ModelError, match="got 48; use another backend"):
        resolve_backend("triton", cuda, torch.bfloat16, width=48)
    assert resolve_backend("triton", cuda, torch.bfloat16, width=64) is AttentionBackend.TRITON
    monkeypatch.setattr("blt_model.tile_attention.HAS_TRITON", False)
    with pytest.raises(ModelError, match="needs the package triton"):
        resolve_backend("triton", cuda, torch.bfloat16)


def test_bounds(seed: int) -> None:
    """Both vectors say the same as the mask."""
    torch.manual_seed(seed)
    lengths = [7, *pieces(50, 30)]
    for window, carried in ((None, 0), (6, 0), (6, 5), (40, 8)):
        valid = int(torch.randint(carried + 1, ()))
        bounds = pack(lengths, window, carried, valid).bounds
        assert bounds is not None
        assert bounds.first.dtype == bounds.ends.dtype == torch.int32
        query = torch.arange(57, device=DEVICE)[:, None]
        key = torch.arange(carried + 57, device=DEVICE)
        allowed = allowed_pairs(lengths, carried, valid, window)
        assert torch.equal(allowed, (key >= bounds.first[:, None]) & (key <= query + carried))
        assert torch.equal(allowed, (query >= key - carried) & (query < bounds.ends))


def test_operations_keep_torchs_rules(kernels: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (random(30, heads, 16, dtype=DTYPES[0]).requires_grad_() for heads in (4, 2, 2))
    bounds = pack([20, 10], 13).bounds
    assert bounds is not None
    inputs = (query, key, value, bounds.first, bounds.ends)
    torch.library.opcheck(torch.ops.blt_model.attend_tiles.default, inputs)
    output, sums = torch.ops.blt_model.attend_tiles(*inputs)
    saved = [tensor.detach() for tensor in (*inputs, output, sums)]
    upstream = torch.randn_like(saved[0])
    torch.library.opcheck(torch.ops.blt_model.attend_tiles_backward.default, (upstream, *saved))


def test_neighbours_change_no_bit(kernels: ModuleType) -> None:
    """Where keys may be carried in, a document's result is the same wherever it stands, and cut at a whole tile."""
    lengths, window, heads, width = [70, 5, 150], 64, 2, 16
    query, key, value = (random(sum(lengths), heads, width) for _ in range(3))
    carry = torch.zeros(window, heads, width, device=DEVICE)

    def run(first: int, lengths: list[int], carried: tuple[Tensor, Tensor], valid: int) -> Tensor:
        part = slice(first, first + sum(lengths))
        inputs = query[part], torch.cat([carried[0], key[part]]), torch.cat([carried[1], value[part]])
        return attend(*inputs, pack(lengths, window, window, valid))

    whole = run(0, lengths, (carry, carry), 0)
    assert torch.equal(run(75, [150], (carry, carry), 0), whole[75:])
    assert torch.equal(run(70, [5, 128], (carry, carry), 0)[5:], whole[75:203])
    before = slice(203 - window, 203)
    assert torch.equal(run(203, [22], (key[before], value[before]), window), whole[203:])


@pytest.mark.skipif(not CUDA, reason="a graph is CUDA's")
def test_waits_for_nothing_and_fits_a_graph(kernels: ModuleType, seed: int) -> None:
    """The plan as well: other documents of the same capacity run through the same graph."""
    torch.manual_seed(seed)
    query, key, value = (random(300, 2, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    offsets = torch.tensor([0, 100, 300], dtype=torch.int32, device=DEVICE)
    upstream = random(300, 2, 64, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        plan = plan_attention(offsets, 300, window=64, backend=AttentionBackend.TRITON)
        result = attend(query, key, value, plan)
        return [result, *torch.autograd.grad(result, (query, key, value), upstream)]

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    offsets[1] = 231
    graph.replay()
    wanted = run()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
