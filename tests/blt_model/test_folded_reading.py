"""Cross-attention folded with a patch against the plain steps in float64; where it runs, see `test_kernels`."""

import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from tests.blt_model.generation_oracle import fresh_blt, fresh_seed
from tests.blt_model.test_kernels import CUDA, DEVICE, TOLERANCE, error, in_interpreter, random
from torch import Tensor, nn

from blt_model.config import CrossAttentionConfig
from blt_model.cross_attention import BytesReadPatches
from blt_model.generation.patch_reading import FOLDED_ROWS, FoldedPatches, KeptPatches, patch_reading
from blt_model.generation.patch_steps import PatchSteps
from blt_model.generation.steps import CrossStep

EPS = 1e-5
LIMITS = {**TOLERANCE, torch.float16: 4e-3}
# The interpreter knows no bfloat16.
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]


@pytest.fixture
def seed() -> int:
    return fresh_seed()


@pytest.fixture
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    if not (CUDA or in_interpreter()):
        pytest.skip("needs CUDA or Triton's interpreter, in which test_in_the_interpreter runs it")
    from blt_model.generation import folding_kernels as module

    return module


@pytest.mark.skipif(CUDA or in_interpreter(), reason="the tests run as they are")
def test_in_the_interpreter() -> None:
    """All other tests of this file, in a process whose Triton interprets."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(in_interpreter(), reason="Triton interprets")
@pytest.mark.parametrize(("dim", "heads", "vectors"), [(1024, 16, 2), (1024, 16, 3), (1280, 20, 4)])
def test_compiles_for_hopper(dim: int, heads: int, vectors: int) -> None:
    """Without a GPU; and what the patch left is loaded before the wait, as far as the registers hold it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from blt_model.generation import folding_kernels as module

    head_room, vector_room = (triton.next_power_of_2(count) for count in (heads, vectors))
    shape = module.reading_shape(dim, dim // 2, head_room * vector_room)
    values = {
        "kind": triton.language.bfloat16,
        "DIM": dim,
        "WORDS": dim // 2,
        "HEADS": heads,
        "HEAD_ROOM": head_room,
        "VECTORS": vectors,
        "VECTOR_ROOM": vector_room,
        "WIDTH": dim // heads,
        "BLOCK": shape.block,
        "CHUNK": shape.chunk,
        "AHEAD": shape.ahead,
        "ALIGNED": 16,
        "DEPENDENT": True,
    }
    words = {"x_words": "*i32", "score_words": "*i32", "residual": "fp32", "eps": "fp32", "scale": "fp32"}
    others = {**words, "count": "i32", "room": "i32", "rows": "*i64"}
    before = {}
    for kernel, block in ((module._read_folded, shape.block), (module._fold_queries, 128), (module._fold_outputs, 8)):
        given = {**values, "BLOCK": block}
        names = kernel.arg_names
        offsets = {name: "*i64" for name in names if name.endswith("_offsets")}
        types = {name: "constexpr" if name in given else {**others, **offsets}.get(name, "*bf16") for name in names}
        aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if types[name].startswith("*")}
        fixed = {(at,): given[name] for at, name in enumerate(names) if name in given}
        source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=aligned)
        options = {"num_warps": shape.warps if kernel is module._read_folded else 4, "launch_pdl": True}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        before[kernel.__name__] = ptx.partition("griddepcontrol.wait")[0]
    held = head_room * vector_room * shape.chunk * shape.ahead // (32 * shape.warps)
    assert before["_read_folded"].count("ld.global.v4.b32") >= held // 4
    assert held <= 64
    assert "ld.global.v4" in before["_fold_queries"]
    assert "ld.global.v4" in before["_fold_outputs"]


def cross_steps(count: int, dim: int, dtype: torch.dtype, **config: Any) -> list[CrossStep]:
    """Cross-attentions whose every weight matters."""
    layers = []
    for _ in range(count):
        module = BytesReadPatches(CrossAttentionConfig(**config), dim, EPS).to(DEVICE)
        for weight in (module.query.weight, module.key_value.weight, module.output.weight):
            nn.init.normal_(weight, std=2 / dim**0.5)
        for norm in (module.query_norm, module.key_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        layers.append(CrossStep.of(module.to(dtype)))
    return layers


def in_float64(layer: CrossStep, x: Tensor, vectors: Tensor) -> Tensor:
    """Bytes [n, dim] that read vectors [n, K, dim], by the formulas."""
    x, vectors = x.double(), vectors.double()
    normed = F.rms_norm(x, x.shape[1:], layer.query_norm.weight.double(), EPS)
    query = (normed @ layer.query.double().T).view(len(x), -1, 1, layer.head_dim)
    read = F.rms_norm(vectors, x.shape[1:], layer.key_norm.weight.double(), EPS) @ layer.key_value.double().T
    key, value = read.view(*read.shape[:2], 2, -1, layer.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    weights = torch.softmax((query * key).sum(-1) / layer.head_dim**0.5, -1)
    mixed = (weights[..., None] * value).sum(2).flatten(1)
    return layer.residual * x + mixed @ layer.output.double().T


CASES = [
    pytest.param(64, {"num_heads": 4, "k": 2}, id="two vectors"),
    pytest.param(96, {"num_heads": 3, "k": 3, "double_residual": False}, id="nothing a power of two"),
    pytest.param(64, {"num_heads": 1, "k": 1}, id="one head, one vector"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "config"), CASES)
def test_equals_the_cross_attention(
    kernels: ModuleType, dim: int, config: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    """Rows in any order and a row twice, as in a step that is filled up; then fewer rows read than there are."""
    torch.manual_seed(seed)
    layers = cross_steps(3, dim, dtype, **config)
    reading = FoldedPatches(layers, 4, config["k"])
    vectors = random(4, config["k"], dim, dtype=dtype)
    for rows in ([2, 0, 0], [1, 3], [0]):
        vectors[rows] = random(len(rows), config["k"], dim, dtype=dtype)
        reading.put(torch.tensor(rows, device=DEVICE), vectors[rows])
    for index, layer in enumerate(layers):
        for count in (4, 1):
            x = 3 * random(count, dim, dtype=dtype)
            found = reading.read(index, x)
            wanted = in_float64(layer, x, vectors[:count])
            assert found.dtype == dtype
            assert error(found - layer.residual * x, wanted - layer.residual * x) < 5 * LIMITS[dtype]
            assert error(found, wanted) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_are_what_they_are_said_to_be(kernels: ModuleType, dtype: torch.dtype, seed: int) -> None:
    """Other kernels read the buffers too."""
    torch.manual_seed(seed)
    layers = cross_steps(2, 64, dtype, num_heads=4, k=2)
    reading = FoldedPatches(layers, 3, 2)
    vectors = random(3, 2, 64, dtype=dtype)
    reading.put(torch.arange(3, device=DEVICE), vectors)
    assert reading.score_map.shape == (2, 3, 8, 64)
    assert reading.output_map.shape == (2, 3, 64, 8)
    x = random(3, 64).double()
    for index, layer in enumerate(layers):
        scores = (reading.score_map[index].double() @ x[:, :, None]).view(3, 4, 2)
        weights = torch.softmax(scores / (x.square().mean(-1) + EPS).sqrt()[:, None, None], -1)
        added = (reading.output_map[index].double() @ weights.view(3, 8, 1)).squeeze(2)
        assert error(layer.residual * x + added, in_float64(layer, x, vectors)) < LIMITS[dtype]


@pytest.mark.parametrize("dim", [32, 768, 1024, 1280])
@pytest.mark.parametrize("slots", [1, 32, 64, 128])
def test_shapes_cover_all_inputs_and_outputs(kernels: ModuleType, dim: int, slots: int) -> None:
    shape = kernels.reading_shape(dim, dim // 2, slots)
    assert dim % shape.block == 0
    assert dim // 2 % shape.chunk == 0
    assert 1 <= shape.ahead <= dim // 2 // shape.chunk
    assert slots * shape.ahead * shape.chunk <= shape.warps * 32 * 64


def test_scattered_weights_must_be_alike(kernels: ModuleType) -> None:
    first = random(8, 8)
    for other in (random(8, 8).T, random(8, 8).half()):
        with pytest.raises(ValueError, match="contiguous, of one dtype"):
            kernels.Scattered.of([first, other])
    assert kernels.Scattered.of([first, first.view(-1)[1:]]).aligned == 1


def test_few_rows_are_folded(kernels: ModuleType) -> None:
    layers = cross_steps(1, 32, DTYPES[0], num_heads=2, k=2)
    assert isinstance(patch_reading(layers, FOLDED_ROWS, 2, is_fused=True), FoldedPatches)
    assert isinstance(patch_reading(layers, FOLDED_ROWS + 1, 2, is_fused=True), KeptPatches)
    assert isinstance(patch_reading(layers, 1, 2, is_fused=False), KeptPatches)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, FOLDED_ROWS + 1])
def test_patch_steps(kernels: ModuleType, rows: int, dtype: torch.dtype, seed: int) -> None:
    """What latents leave for the decoder, in both forms, also in a row that was copied."""
    model = fresh_blt(seed).to(DEVICE, dtype)
    quick = PatchSteps(model, rows, is_fused=True)
    wide = PatchSteps(fresh_blt(seed).to(DEVICE, dtype).double(), rows)
    config = model.config
    for put in ([0, 1, 2], [1, 0]):
        latents = random(len(put), config.latent.dim, dtype=dtype)
        at = torch.tensor(put, device=DEVICE)
        quick.put_latents(at, latents)
        wide.put_latents(at, latents.double())
    for steps in (quick, wide):
        steps.copy_row(2, 1, patches=1, open_length=0)
    for index in range(config.decoder.num_layers):
        x = random(3, config.decoder.dim, dtype=dtype)
        assert error(quick.read(index, x), wide.read(index, x.double())) < LIMITS[dtype]
