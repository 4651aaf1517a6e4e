"""The kernels for linear maps of one row and of few in all their shapes, against float64; see `test_kernels`."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from tests.blt_model.generation_oracle import fresh_seed
from tests.blt_model.test_kernels import error, random
from tests.blt_model.triton_runs import CUDA, DEVICE, compiles, need_kernels, run_interpreted, runs_interpreted
from torch import Tensor

# The interpreter knows no bfloat16.
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def kernels() -> ModuleType:
    need_kernels()
    from blt_model.generation import linear_kernels as module

    return module


@runs_interpreted
def test_in_the_interpreter() -> None:
    """All other tests of this file, in a process whose Triton interprets."""
    run_interpreted(__file__)


def ptx_of(kernel: Any, shape: Any, values: dict[str, Any], others: dict[str, str]) -> str:
    """What a kernel is compiled to for a GPU that need not be there; arguments without a type are words."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = {"DEPENDENT": True, "EXACT": True, "CHUNK": shape.chunk, **values}
    names = kernel.arg_names
    types = {name: "constexpr" if name in values else others.get(name, "*i32") for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if types[name].startswith("*")}
    fixed = {(names.index(name),): value for name, value in values.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=aligned)
    options = {"num_warps": shape.warps, "maxnreg": shape.registers, "launch_pdl": True}
    triton = importlib.import_module("triton")
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return ptx


@compiles
@pytest.mark.parametrize("sizes", [(6144, 2048, False), (5632, 2048, True), (2048, 5632, False)], ids=str)
def test_compiles_for_hopper(sizes: tuple[int, int, bool]) -> None:
    """Without a GPU; and the loads of the first weights come before the wait, as they would be slow behind it."""
    triton = pytest.importorskip("triton")
    from blt_model.generation.linear_kernels import _linear_one, linear_shape

    outputs, inputs, gated = sizes
    shape = linear_shape(outputs, inputs // 2, gated=gated, joined=False)
    values = {
        "kind": triton.language.bfloat16,
        "WORDS": inputs // 2,
        "NORM": gated,
        "GATED": gated,
        "RESIDUAL": True,
        "SPLITS": 0,
        "HEADS": 1,
        "ROOM": 1,
        "WIDTH": 1,
        "EACH": shape.rows // shape.groups,
        "GROUPS": shape.groups,
        "AHEAD": shape.ahead,
    }
    numbers = {"outputs": "i32", "eps": "fp32", "residual_scale": "fp32"}
    ptx = ptx_of(_linear_one, shape, values, {**numbers, "residual": "*bf16", "out": "*bf16", "stats": "*fp32"})
    before, _, after = ptx.partition("griddepcontrol.wait")
    # A load is of four words of each thread: of a chunk's weights in all outputs, of x, or of the scales before it.
    chunks = triton.cdiv(inputs // 2, shape.chunk)
    begun = min(chunks, shape.ahead)
    of_weights = shape.rows * shape.chunk // (4 * 32 * shape.warps) * (2 if gated else 1)
    of_inputs = 2 if gated else 1
    assert before.count("ld.global.v4.b32") == begun * of_weights
    assert after.count("ld.global.v4.b32") == (chunks - begun) * of_weights + chunks * of_inputs


@compiles
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sizes", [(18432, 1024), (2048, 1024), (1024, 5632)], ids=str)
def test_few_rows_compile_for_hopper(sizes: tuple[int, int], scaled: bool, rows: int) -> None:
    """The weights are loaded once whatever the rows, and the first of them before the wait."""
    triton = pytest.importorskip("triton")
    from blt_model.generation.few_kernels import _linear_few, few_shape

    outputs, inputs = sizes
    shape = few_shape(outputs, inputs // 2)
    values = {
        "kind": triton.language.bfloat16,
        "WORDS": inputs // 2,
        "ROWS": rows,
        "NORM": True,
        "SCALED": scaled,
        "RESIDUAL": True,
        "EACH": shape.rows // shape.groups,
        "GROUPS": shape.groups,
        "AHEAD": shape.ahead,
    }
    numbers = {"outputs": "i32", "eps": "fp32", "residual_scale": "fp32"}
    ptx = ptx_of(_linear_few, shape, values, {**numbers, "residual": "*bf16", "out": "*bf16"})
    before, _, after = ptx.partition("griddepcontrol.wait")
    chunks = triton.cdiv(inputs // 2, shape.chunk)
    begun = min(chunks, shape.ahead)
    of_weights = shape.rows * shape.chunk // (4 * 32 * shape.warps)
    of_inputs = rows + scaled
    assert before.count("ld.global.v4.b32") == begun * of_weights
    assert after.count("ld.global.v4.b32") == (chunks - begun) * of_weights + chunks * of_inputs


@compiles
@pytest.mark.parametrize("mean", [False, True])
def test_maps_of_pooled_bytes_compile_for_hopper(mean: bool) -> None:
    """The weights are under way before the wait, and several bytes at once after it."""
    triton = pytest.importorskip("triton")
    from blt_model.generation.linear_kernels import linear_shape
    from blt_model.generation.patch_kernels import _AT_ONCE, _map_pooled

    shape = linear_shape(2048, 512, gated=False, joined=True)
    values = {
        "kind": triton.language.bfloat16, "WORDS": 512, "MEAN": mean, "EACH": shape.rows, "PLACES": _AT_ONCE
    }  # fmt: skip
    ptx = ptx_of(_map_pooled, shape, values, {"outputs": "i32", "out": "*bf16", "lengths": "*i64"})
    before, _, after = ptx.partition("griddepcontrol.wait")
    assert before.count("ld.global.v4.b32") == shape.rows * shape.chunk // (4 * 32 * shape.warps)
    assert after.count("ld.global.v4.b32") == _AT_ONCE


SHAPES = [
    pytest.param({"rows": 4, "chunk": 128, "warps": 4, "ahead": 8}, id="all ahead"),
    pytest.param({"rows": 16, "chunk": 128, "warps": 4, "ahead": 2}, id="few ahead"),
    pytest.param({"rows": 8, "chunk": 256, "warps": 4, "ahead": 1}, id="two warps a chunk"),
    pytest.param({"rows": 2, "chunk": 1024, "warps": 8, "ahead": 1}, id="one chunk"),
    pytest.param(None, id="the usual"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sizes", [(40, 1024), (27, 336)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(
    kernels: ModuleType,
    shape: dict[str, int] | None,
    sizes: tuple[int, int],
    gated: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Outputs and inputs that blocks divide, and that they do not."""
    torch.manual_seed(seed)
    outputs, inputs = sizes
    x, scale = random(1, inputs, dtype=dtype), random(inputs, dtype=dtype)
    weight = random(outputs * (2 if gated else 1), inputs, dtype=dtype) / inputs**0.5
    residual = random(1, outputs, dtype=dtype)
    launch = None if shape is None else kernels.LinearShape(**shape)

    def found(**options: object) -> Tensor:
        result: Tensor = kernels.linear(x, weight, gated=gated, shape=launch, **options)
        return result

    def wanted(values: Tensor) -> Tensor:
        products: Tensor = values @ weight.double().T
        return F.silu(products[:, :outputs]).mul(products[:, outputs:]) if gated else products

    normed = F.rms_norm(x.double(), (inputs,), scale.double(), EPS)
    assert error(found(), wanted(x.double())) < LIMITS[dtype]
    assert error(found(norm=scale, eps=EPS), wanted(normed)) < LIMITS[dtype]
    added = found(residual=residual, residual_scale=-2.0, dtype=torch.float32)
    assert added.dtype == torch.float32
    assert error(added, wanted(x.double()) - 2 * residual.double()) < LIMITS[dtype]


FEW_SHAPES = [
    pytest.param({"rows": 4, "chunk": 128, "warps": 4, "ahead": 2}, id="few ahead"),
    pytest.param({"rows": 8, "chunk": 256, "warps": 4, "ahead": 1}, id="two warps a chunk"),
    pytest.param(None, id="the usual"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sizes", [(40, 1024), (27, 336)], ids=str)
@pytest.mark.parametrize("shape", FEW_SHAPES)
def test_few_rows(
    kernels: ModuleType, shape: dict[str, int] | None, sizes: tuple[int, int], rows: int, dtype: torch.dtype, seed: int
) -> None:
    """Each row has its own product, normalisation and residual; more rows than the kernel takes have them too."""
    from blt_model.generation.few_kernels import few_rows

    torch.manual_seed(seed)
    outputs, inputs = sizes
    # Rows of different sizes, of which one's normalisation would not do for another.
    x = (random(rows, inputs) * torch.arange(1, rows + 1, device=DEVICE)[:, None]).to(dtype)
    scale, residual = random(inputs, dtype=dtype), random(rows, outputs, dtype=dtype)
    weight = random(outputs, inputs, dtype=dtype) / inputs**0.5
    launch = None if shape is None else kernels.LinearShape(**shape)
    for norm, eps in [(None, None), (None, 0.5), (scale, 0.5)]:
        wide = x.double()
        if eps is not None:
            wide = F.rms_norm(wide, (inputs,), None if norm is None else norm.double(), eps)
        products = wide @ weight.double().T
        found = few_rows(x, weight, norm=norm, eps=eps, shape=launch)
        assert found.dtype == dtype
        assert error(found, products) < LIMITS[dtype]
        found = few_rows(x, weight, norm=norm, eps=eps, residual=residual, residual_scale=-2.0, shape=launch)
        assert error(found, products - 2 * residual.double()) < LIMITS[dtype]


def test_scales_without_eps_are_refused(kernels: ModuleType) -> None:
    from blt_model.generation.few_kernels import few_rows

    x = random(2, 32)
    with pytest.raises(ValueError, match="need its eps"):
        few_rows(x, x, norm=x[0])


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_many_outputs_of_few_rows(kernels: ModuleType, rows: int, seed: int) -> None:
    """As many as have programs take more of them, and not all of these programs full."""
    from blt_model.generation.few_kernels import few_rows, few_shape

    torch.manual_seed(seed)
    dtype = DTYPES[0]
    x, weight = random(rows, 32, dtype=dtype), random(16 * 256 + 3, 32, dtype=dtype)
    assert few_shape(len(weight), 16).rows > few_shape(1024, 16).rows
    assert error(few_rows(x, weight), x.double() @ weight.double().T) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(4, 16), (3, 32)])
@pytest.mark.parametrize("splits", [2, 4])
def test_parts_of_attention_are_joined(
    kernels: ModuleType, splits: int, heads: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    """For one row within the map, for more by a kernel of its own; parts that saw nothing count for nothing."""
    torch.manual_seed(seed)
    inputs = heads * width
    partial, mass = random(3, splits, heads, width), random(3, splits, heads).abs() + 0.1
    best = 5 * random(3, splits, heads)
    best[:, -1], mass[:, -1], partial[:, -1] = -torch.inf, 0.0, 0.0
    stats = torch.stack([best, mass], dim=-1)
    weight, residual = random(40, inputs, dtype=dtype) / inputs**0.5, random(3, 40, dtype=dtype)
    shares = (best - best.amax(1, keepdim=True)).double().exp()
    joined = ((shares[..., None] * partial.double()).sum(1) / (shares * mass).sum(1)[..., None]).flatten(1)
    assert error(kernels.join(partial, stats, torch.float32), joined) < LIMITS[torch.float32]
    for rows in (1, 3):
        wanted = joined[:rows] @ weight.double().T + residual[:rows].double()
        found = kernels.linear(partial[:rows], weight, stats=stats[:rows], residual=residual[:rows])
        assert error(found, wanted) < LIMITS[dtype]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("inputs", [768, 1024, 2048, 2816, 5632, 11264])
@pytest.mark.parametrize("outputs", [260, 768, 6144])
def test_usual_shapes_fit_the_registers(kernels: ModuleType, outputs: int, inputs: int, gated: bool) -> None:
    shape = kernels.linear_shape(outputs, inputs // 2, gated=gated, joined=False)
    held = shape.rows * shape.chunk * shape.ahead * (2 if gated else 1) // (32 * shape.warps)
    assert held <= 96
    assert shape.rows % shape.groups == 0
    assert shape.groups * shape.chunk == shape.warps * 128
