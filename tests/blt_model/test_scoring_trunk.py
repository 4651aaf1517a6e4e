"""The trunk that scores against the model itself in float64; its kernels on CUDA, elsewhere by Triton's interpreter."""

from __future__ import annotations

import copy
import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from tests.blt_model.generation_oracle import fresh_byte_lm, fresh_seed
from tests.blt_model.samples import Array, framed_document
from tests.blt_model.streaming import stream
from tests.blt_model.triton_runs import CUDA, DEVICE, compiles, need_kernels, run_interpreted, runs_interpreted
from torch import Tensor, nn

from blt_model import ByteLM, ModelError, ScoringTrunk, StreamState, next_byte_entropy, pack_documents, scoring_trunk
from blt_model.layers import Block, rotary_tables, rotate
from blt_model.scoring_trunk import fits_float16

#: Lengths of an empty document, of short ones, and of some that no window of the tests holds.
SIZES = (0, 1, 5, 40, 0, 130, 12)
# The interpreter knows no bfloat16.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def seed() -> int:
    seed = fresh_seed()
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def kernels() -> ModuleType:
    need_kernels()
    from blt_model import pointwise_kernels

    return pointwise_kernels


@runs_interpreted
def test_in_the_interpreter() -> None:
    """The tests of kernels, in a process whose Triton interprets."""
    run_interpreted(__file__, "-k", "kernels or normalized or in_place or scaled or products")


def model(seed: int, **transformer: Any) -> ByteLM:
    lm = fresh_byte_lm(seed, transformer=transformer)
    for module in lm.modules():
        if isinstance(module, nn.RMSNorm | type(lm.norm)):
            nn.init.uniform_(module.weight, 0.3, 2.0)
    return lm


def documents(seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [framed_document(rng, size) for size in SIZES]


def exact(lm: ByteLM, rows: list[Array]) -> Tensor:
    """Logits in float64, each document whole and alone; EOS is the last input."""
    wide = copy.deepcopy(lm).double()
    with torch.no_grad():
        return torch.cat([wide(pack_documents([np.append(row, 0)])[0]) for row in rows])


def streamed(trunk: ScoringTrunk, rows: list[Array], length: int) -> Tensor:
    """Logits by way of windows."""

    def step(tokens: Tensor, offsets: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        x, state = trunk.stream_trunk(tokens, offsets, trunk.initial_state() if state is None else state)
        return trunk.wide_logits(x), state

    return stream(step, rows, length, DEVICE).cpu()


@pytest.mark.parametrize("window", [1, 8, 128])
@pytest.mark.parametrize("length", [1, 7, 100, 1000])
def test_logits_are_the_models(window: int, length: int, seed: int) -> None:
    lm, rows = model(seed, window=window, num_kv_heads=1), documents(seed)
    found = streamed(ScoringTrunk(lm, DEVICE, dtype=torch.float64), rows, length)
    torch.testing.assert_close(found.double(), exact(lm, rows), rtol=1e-5, atol=1e-5)
    assert next(lm.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_close(dtype: torch.dtype, seed: int) -> None:
    lm, rows = model(seed, dim=64, num_layers=6), documents(seed)
    found, wanted = streamed(ScoringTrunk(lm, DEVICE, dtype=dtype), rows, 100), exact(lm, rows)
    error = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < error < (4e-3 if dtype == torch.float16 else 3e-2)


@pytest.mark.parametrize("finishes", [False, True])
@pytest.mark.parametrize("length", [9, 100])
def test_with_kernels(
    kernels: ModuleType, length: int, finishes: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_trunk, "takes_kernels", lambda tensor: tensor.dtype != torch.float64)
    monkeypatch.setattr(scoring_trunk, "_finishes_products", lambda *_: finishes)
    lm, rows = model(seed, window=8, dim=48, num_heads=3, num_kv_heads=1), documents(seed)
    dtype = torch.float16 if CUDA else torch.float32
    found, wanted = streamed(ScoringTrunk(lm, DEVICE, dtype=dtype), rows, length), exact(lm, rows)
    assert (found - wanted).norm() < (4e-3 if CUDA else 1e-5) * wanted.norm()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 300.0])
def test_entropies_are_as_exact_as_float32_with_kernels(
    kernels: ModuleType, scale: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_trunk, "takes_kernels", lambda tensor: True)
    lm = model(seed, dim=48, num_heads=3)
    with torch.no_grad():
        lm.head.weight.mul_(scale)
    trunk = ScoringTrunk(lm, DEVICE)
    x = torch.randn(21, 48, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).half()
    wide = F.rms_norm(x.double(), (48,), eps=lm.norm.eps) * lm.norm.weight.to(DEVICE).double()
    logarithms = (wide @ lm.head.weight.to(DEVICE).double().T).log_softmax(-1)
    wanted = -(logarithms.exp() * logarithms).sum(-1)
    found = trunk.entropies(x)
    assert found.dtype == torch.float32
    # Float32 logits are off by as much; their largest is some 10 times the scale.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    torch.testing.assert_close(found, next_byte_entropy(trunk.wide_logits(x)), rtol=1e-5, atol=1e-5 * max(1.0, scale))
    x[3, 5] = torch.inf
    assert torch.equal(trunk.entropies(x).isfinite().nonzero().flatten().cpu(), torch.arange(21)[torch.arange(21) != 3])
    assert trunk.entropies(x[:0]).shape == (0,)


def test_an_empty_window_is_refused(seed: int) -> None:
    trunk = ScoringTrunk(model(seed), "cpu")
    with pytest.raises(ModelError, match="the window holds no token"):
        trunk.stream_trunk(torch.empty(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), trunk.initial_state())


def test_weights_beyond_float16_are_refused(seed: int) -> None:
    lm = model(seed)
    block = lm.blocks[1]
    assert isinstance(block, Block)
    with torch.no_grad():
        block.attention.query_key_value.weight[3] *= 1e5
    with pytest.raises(
        ModelError, match=r"of block 1 may reach .*, which torch.float16 does not hold; score in bfloat16"
    ):
        ScoringTrunk(lm, "cpu")
    ScoringTrunk(lm, "cpu", dtype=torch.bfloat16)


def test_which_weights_fit_float16(seed: int) -> None:
    lm = model(seed)
    assert fits_float16(lm)
    block = lm.blocks[1]
    assert isinstance(block, Block)
    with torch.no_grad():
        block.attention_norm.weight.mul_(1e5)
    assert not fits_float16(lm)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    scale = float(wanted.abs().max()) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(0, 8), (1, 1), (5, 40), (3, 1030), (2, 5000)])
def test_rows_are_normalized(kernels: ModuleType, dtype: torch.dtype, rows: int, dim: int) -> None:
    # Rows of a wider matrix.
    x = torch.randn(rows, dim + 3, device=DEVICE).to(dtype)[:, :dim]
    wide = x.double()
    found = kernels.normalize(x, 1e-5)
    assert found.is_contiguous()
    assert found.dtype == dtype
    close(found, F.rms_norm(wide, (dim,), eps=1e-5), dtype)
    scales = kernels.row_scales(x, 1e-5)
    assert scales.dtype == torch.float32
    close(scales, (wide.square().mean(-1) + 1e-5).rsqrt(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "heads", "others", "width"), [(1, 1, 0, 16), (37, 9, 3, 32), (70, 24, 12, 64)])
def test_heads_are_turned_in_place(
    kernels: ModuleType, dtype: torch.dtype, length: int, heads: int, others: int, width: int
) -> None:
    whole = torch.randn(length + 2, (heads + others) * width, device=DEVICE).to(dtype)
    before = whole.clone()
    positions = torch.randint(0, 5_000, (length,), device=DEVICE)
    cosine, sine = rotary_tables(positions, width, 10_000.0)
    kernels.turn_in_place(whole[2:], (cosine, sine), heads, width)
    turning = before[2:, : heads * width].view(length, heads, width).double()
    wanted = rotate(turning, cosine.double(), sine.double()).flatten(1)
    close(whole[2:, : heads * width], wanted, dtype)
    assert torch.equal(whole[2:, heads * width :], before[2:, heads * width :])
    assert torch.equal(whole[:2], before[:2])
    kernels.turn_in_place(whole[:0], (cosine[:0], sine[:0]), heads, width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_and_values_are_scaled_first(kernels: ModuleType, dtype: torch.dtype) -> None:
    gate_value = torch.randn(5, 2 * 1030, device=DEVICE).to(dtype)
    scales = torch.rand(5, device=DEVICE) * 3
    gate, value = (gate_value.double() * scales.double()[:, None]).chunk(2, dim=-1)
    close(kernels.swiglu(gate_value, scales=scales), F.silu(gate) * value, dtype)


# The last one is larger than a tile whose sizes are those of a GPU.
PRODUCTS = [(0, 64, 1, 16), (1, 8, 1, 16), (37, 72, 3, 32), (150, 48, 5, 64)]


def tiles(products: ModuleType, length: int) -> dict[str, Any]:
    """Small ones for small products, so that a program makes several; else a GPU's."""
    small = products.Tiles(rows=64 if CUDA else 16, columns=64, inputs=16, warps=4, stages=2, group=2)
    return {} if length > 100 else {"tiles": small}


@pytest.fixture
def products() -> ModuleType:
    need_kernels()
    from blt_model import product_kernels

    return product_kernels


HALF = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("length", "inputs", "heads", "width"), PRODUCTS)
def test_products_are_turned(
    products: ModuleType, dtype: torch.dtype, length: int, inputs: int, heads: int, width: int
) -> None:
    # Rows of a wider matrix, and results below others.
    x = torch.randn(length, inputs + 8, device=DEVICE).to(dtype)[:, :inputs]
    matrix = torch.randn(3 * heads * width, inputs, device=DEVICE).to(dtype)
    scales = torch.rand(length, device=DEVICE) * 3
    angles = rotary_tables(torch.randint(0, 5_000, (length,), device=DEVICE), width, 10_000.0)
    whole = torch.full((length + 2, len(matrix)), 7.0, device=DEVICE).to(dtype)
    products.turned_product(
        x, matrix, scales, angles, whole[2:], heads=2 * heads, width=width, **tiles(products, length)
    )
    wanted = scales.double()[:, None] * (x.double() @ matrix.double().T)
    if length:
        turning = wanted[:, : 2 * heads * width].reshape(length, 2 * heads, width)
        wanted[:, : 2 * heads * width] = rotate(turning, *(angle.double() for angle in angles)).flatten(1)
    close(whole[2:], wanted, dtype)
    assert bool((whole[:2] == 7).all())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("length", "inputs", "heads", "width"), PRODUCTS)
def test_products_are_gated(
    products: ModuleType, dtype: torch.dtype, length: int, inputs: int, heads: int, width: int
) -> None:
    x = torch.randn(length, inputs, device=DEVICE).to(dtype)
    gates, values = (torch.randn(heads * width, inputs, device=DEVICE).to(dtype) for _ in range(2))
    scales = torch.rand(length, device=DEVICE)
    by_turns = torch.stack([gates, values], 1).flatten(0, 1)
    found = products.gated_product(x, by_turns, scales, **tiles(products, length))
    gate, value = (scales.double()[:, None] * (x.double() @ matrix.double().T) for matrix in (gates, values))
    assert found.dtype == dtype
    close(found, F.silu(gate) * value, dtype)


@compiles
@pytest.mark.parametrize("gated", [False, True])
def test_products_compile_for_hopper(gated: bool) -> None:
    """Without a GPU; tiles fit the shared memory, and sums are made by a warp group's largest instruction."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from blt_model import product_kernels

    cut = product_kernels.GATING if gated else product_kernels.TURNING
    kernel = product_kernels._product
    values = {"N": 4096 if gated else 2304, "K": 768, "TURNED": 0 if gated else 1536, "WIDTH": 0 if gated else 64}
    values |= {"GATED": gated, "ROWS": cut.rows, "COLUMNS": cut.columns, "INPUTS": cut.inputs, "GROUP": cut.group}
    blocks = {"x": cut.inputs, "matrix": cut.inputs, "out": cut.columns // (2 if gated else 4)}
    types = {name: "constexpr" if name in values else "*fp32" for name in kernel.arg_names} | {"count": "i32"}
    for name, across in blocks.items():
        types[name] = f"tensordesc<fp16[{cut.columns if name == 'matrix' else cut.rows},{across}]>"
    fixed = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= 227 * 1024
    assert set(re.findall(r"wgmma\.mma_async\S*\.(m64n\d+k16)", made.asm["ptx"])) == {"m64n256k16"}
    # Nothing but factors and angles goes through registers on its way in or out.
    assert "st.global" not in made.asm["ptx"]


@compiles
@pytest.mark.parametrize("scales_only", [False, True])
def test_compiles_for_hopper(scales_only: bool) -> None:
    """Without a GPU; every access to half precision is of sixteen bytes."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from blt_model import pointwise_kernels

    numbers = {"count": "i32", "step": "i32", "eps": "fp32"}
    wide = dict.fromkeys(("cosine", "sine", "scales"), "*fp32")
    if scales_only:
        wide["out"] = "*fp32"
    cases: dict[str, dict[str, Any]] = {
        "_normalize": {"DIM": 768, "BLOCK": 1024, "ROWS": 4, "SCALES_ONLY": scales_only},
        "_turn_in_place": {"HEADS": 24, "WIDTH": 64, "ROWS": 32, "EACH": 8},
        "_swiglu": {"N": 2048, "BLOCK": 1024, "DEPENDENT": False} | ({} if scales_only else {"scales": None}),
    }
    for name, values in cases.items():
        kernel = getattr(pointwise_kernels, name)
        names = kernel.arg_names
        types = {key: "constexpr" if key in values else (numbers | wide).get(key, "*fp16") for key in names}
        # Rows begin at multiples of sixteen bytes.
        whole = {
            (index,): [["tt.divisibility", 16]]
            for index, key in enumerate(names)
            if types[key][0] == "*" or key == "step"
        }
        fixed = {(names.index(key),): value for key, value in values.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=whole)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
        accesses = set(re.findall(r"(?:ld|st)\.global[.\w]*", ptx))
        # A number alone is a row's scale.
        assert accesses <= {"ld.global.v4.b32", "st.global.v4.b32", "ld.global.b32", "st.global.b32"}, name
        assert "ld.global.v4.b32" in accesses
