"""The kernel for a linear map of one row in all its shapes, against float64; where it runs, see `test_kernels`."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from tests.blt_model.generation_oracle import fresh_seed
from tests.blt_model.test_kernels import error, random
from tests.blt_model.triton_runs import CUDA, compiles, need_kernels, run_interpreted, runs_interpreted
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


@compiles
@pytest.mark.parametrize("sizes", [(6144, 2048, False), (5632, 2048, True), (2048, 5632, False)], ids=str)
def test_compiles_for_hopper(sizes: tuple[int, int, bool]) -> None:
    """Without a GPU; and the loads of the first weights come before the wait, as they would be slow behind it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
        "CHUNK": shape.chunk,
        "AHEAD": shape.ahead,
        "EXACT": True,
        "DEPENDENT": True,
    }
    numbers = {"outputs": "i32", "eps": "fp32", "residual_scale": "fp32"}
    others = {**numbers, "residual": "*bf16", "out": "*bf16", "stats": "*fp32"}
    names = _linear_one.arg_names
    types = {name: "constexpr" if name in values else others.get(name, "*i32") for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if types[name].startswith("*")}
    fixed = {(names.index(name),): value for name, value in values.items()}
    source = ASTSource(fn=_linear_one, signature=types, constexprs=fixed, attrs=aligned)
    options = {"num_warps": shape.warps, "maxnreg": shape.registers, "launch_pdl": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    before, _, after = ptx.partition("griddepcontrol.wait")
    # A load is of four words of each thread: of a chunk's weights in all outputs, of x, or of the scales before it.
    chunks = triton.cdiv(inputs // 2, shape.chunk)
    begun = min(chunks, shape.ahead)
    of_weights = shape.rows * shape.chunk // (4 * 32 * shape.warps) * (2 if gated else 1)
    of_inputs = 2 if gated else 1
    assert before.count("ld.global.v4.b32") == begun * of_weights
    assert after.count("ld.global.v4.b32") == (chunks - begun) * of_weights + chunks * of_inputs


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
