"""The Triton kernels over segments against torch's operations in float64: on CUDA, or by Triton's interpreter."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.blt_model.generation_oracle import fresh_seed
from tests.blt_model.triton_runs import CUDA, DEVICE, compiles, need_kernels, run_interpreted, runs_interpreted
from torch import Tensor

from blt_model import BLT, BLTConfig, pack_documents, preset, segment_operators
from blt_model.cross_attention import BytesReadPatches, PatchesReadBytes
from blt_model.loss import cross_entropy_sum
from blt_model.segments import (
    Segments,
    bytes_read_patches_by_steps,
    patches_read_bytes_by_steps,
    segment_max_by_steps,
    segment_mean_by_steps,
)

# The interpreter knows no bfloat16.
DTYPES = [torch.float32, torch.bfloat16 if CUDA else torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(1, 2, 16), (2, 2, 64), (3, 3, 12), (4, 1, 8)]
"""K, H and E; the third are no powers of two."""


@pytest.fixture
def rng() -> np.random.Generator:
    need_kernels()
    seed = fresh_seed()
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@runs_interpreted
def test_in_the_interpreter() -> None:
    """All other tests of this file, in a process whose Triton interprets."""
    run_interpreted(__file__)


@compiles
@pytest.mark.parametrize("vectors", [2, 3])
def test_compiles_for_hopper(vectors: int) -> None:
    """The interpreter takes programs that the compiler refuses; the compiler needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from blt_model import cross_kernels, segment_kernels

    integers = {"ids": "*i64", "offsets": "*i32", "num_windows": "i32", "length": "i32", "scale": "fp32"}
    wide = dict.fromkeys(("buffer", "buffer_sums", "sums", "shares"), "*fp32")
    pooling = {"WIDTH": 96, "CHUNK": 64, "ROWS": 8, "COLUMNS": 256}
    work = [
        *((segment_kernels._pool, {**pooling, "MODE": mode}, 1) for mode in range(4)),
        *((segment_kernels._join, {**pooling, "MODE": mode}, 2) for mode in range(4)),
        *((segment_kernels._spread, {**pooling, "MODE": mode}, 1) for mode in (1, 2)),
    ]
    empty = torch.empty(0, dtype=torch.int64), torch.empty(5, vectors, 16, 24 * vectors)
    constants = cross_kernels._Launch.of(*empty, None).constants
    warps = constants.pop("num_warps")
    names = ("_bytes_read", "_bytes_read_gradient", "_patches_read", "_patches_read_gradient", "_join_mixed")
    work += [(getattr(cross_kernels, name), constants, warps) for name in names]
    for kernel, values, num_warps in work:
        types = {
            name: "constexpr" if name in values else integers.get(name, wide.get(name, "*bf16"))
            for name in kernel.arg_names
        }
        fixed = {(kernel.arg_names.index(name),): value for name, value in values.items() if name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs=fixed)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm["ptx"]


def segments_of(sizes: list[int]) -> Segments:
    offsets = torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32, device=DEVICE)
    return Segments.from_offsets(offsets, sum(sizes))


def random_segments(rng: np.random.Generator) -> Segments:
    """Short and empty ones, ones of about a chunk, and one of several chunks among them, in random order."""
    sizes = [*rng.integers(0, 7, 6), int(rng.integers(60, 70)), int(rng.integers(130, 260))]
    return segments_of([int(size) for size in rng.permutation(sizes)])


def compare(
    ours: Callable[..., Tensor], by_steps: Callable[..., Tensor], dtype: torch.dtype, *leaves: Tensor
) -> list[Tensor]:
    """Check results and gradients for the same rounded inputs; return them."""
    rounded = [leaf.to(dtype) for leaf in leaves]
    mine = [leaf.clone().requires_grad_() for leaf in rounded]
    exact = [leaf.double().requires_grad_() for leaf in rounded]
    result, wanted = ours(*mine), by_steps(*exact)
    assert result.dtype == dtype
    upstream = torch.randn(wanted.shape, device=DEVICE).to(dtype)
    found = [result, *torch.autograd.grad(result, mine, upstream)]
    expected = [wanted, *torch.autograd.grad(wanted, exact, upstream.double())]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        # The gradient of a softmax over one byte is nought: there is nothing for an error to be relative to.
        scale = other.norm() if other.any() else 1
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * scale
    return found


def read_by_bytes(segments: Segments, query: Tensor, key_value: Tensor) -> Tensor:
    result: Tensor = segment_operators.bytes_read(query, key_value, segments.ids, segments.offsets)
    return result


def read_by_patches(segments: Segments, query: Tensor, key_value: Tensor) -> Tensor:
    result: Tensor = segment_operators.patches_read(query, key_value, segments.ids, segments.offsets)[0]
    return result


def compare_attentions(segments: Segments, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    vectors, heads, width = shape
    length, count = len(segments.ids), segments.count
    by_byte, by_patch = (length, heads, width), (count, vectors, heads, width)
    found = compare(
        functools.partial(read_by_bytes, segments),
        lambda query, key_value: bytes_read_patches_by_steps(query, key_value, segments),
        dtype,
        torch.randn(by_byte, device=DEVICE),
        torch.randn(count, vectors, 2, heads, width, device=DEVICE),
    )
    return found + compare(
        functools.partial(read_by_patches, segments),
        lambda query, key_value: patches_read_bytes_by_steps(query, key_value, segments),
        dtype,
        torch.randn(by_patch, device=DEVICE),
        torch.randn(length, 2, heads, width, device=DEVICE),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_attentions(shape: tuple[int, int, int], dtype: torch.dtype, rng: np.random.Generator) -> None:
    compare_attentions(random_segments(rng), shape, dtype)


@pytest.mark.parametrize("sizes", [[1], [0, 0, 1, 0], [700], [64, 64, 65, 128, 129], [0, 300], [63, 1, 64, 200, 0]])
def test_lengths_around_those_of_chunks(sizes: list[int], rng: np.random.Generator) -> None:
    compare_attentions(segments_of(sizes), (2, 2, 8), torch.float32)


def test_no_bytes_at_all(rng: np.random.Generator) -> None:
    segments = segments_of([0, 0])
    for tensor in compare_attentions(segments, (2, 2, 8), torch.float32):
        assert not tensor.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 300])
def test_pooling(width: int, dtype: torch.dtype, rng: np.random.Generator) -> None:
    segments = random_segments(rng)
    ids, offsets = segments.ids, segments.offsets
    # Small whole numbers, which tie.
    ties = torch.randint(-3, 3, (len(ids), width), device=DEVICE).float()
    for values in (ties, torch.randn(len(ids), width, device=DEVICE)):
        compare(
            lambda x: segment_operators.maximum(x, ids, offsets),
            lambda x: segment_max_by_steps(x, segments),
            dtype,
            values,
        )
    compare(
        lambda x: segment_operators.mean(x, ids, offsets), lambda x: segment_mean_by_steps(x, segments), dtype, ties
    )


def test_scores_of_thousands_do_not_overflow(rng: np.random.Generator) -> None:
    segments = random_segments(rng)
    length, count = len(segments.ids), segments.count
    patches = 1e3 * torch.randn(count, 2, 2, 2, 8, device=DEVICE)
    read = 1e3 * torch.randn(length, 2, 2, 8, device=DEVICE)
    assert read_by_bytes(segments, read[:, 0], patches).isfinite().all()
    assert read_by_patches(segments, patches[:, :, 0], read).isfinite().all()


def test_results_are_equal_to_the_bit_every_time(rng: np.random.Generator) -> None:
    segments = random_segments(rng)
    seed = int(rng.integers(1 << 30))

    def results() -> list[Tensor]:
        torch.manual_seed(seed)
        return compare_attentions(segments, (2, 2, 16), torch.float32)

    for one, other in zip(results(), results(), strict=True):
        assert torch.equal(one, other)


def test_operations_obey_torch(rng: np.random.Generator) -> None:
    """Schemas, fake implementations and backwards agree with what the operations do, also when traced."""
    segments = segments_of([1, 0, 3, 70])
    where = segments.ids, segments.offsets

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, requires_grad=True)

    torch.library.opcheck(segment_operators.bytes_read, (leaf(74, 2, 8), leaf(4, 2, 2, 2, 8), *where))
    torch.library.opcheck(segment_operators.patches_read, (leaf(4, 2, 2, 8), leaf(74, 2, 2, 8), *where))
    torch.library.opcheck(segment_operators.maximum, (leaf(74, 6), *where))
    torch.library.opcheck(segment_operators.mean, (leaf(74, 6), *where))


def small_work(rng: np.random.Generator) -> tuple[BLT, Callable[[], list[Tensor]]]:
    """A model, and what gives its loss and gradients for some ragged documents."""
    config = preset("blt-debug")
    assert isinstance(config, BLTConfig)
    texts = [np.array([1, *rng.integers(4, 260, length), 2]) for length in (3, 90, 20)]
    lengths = [np.array([1, 2, *[5] * ((len(text) - 3) // 5), (len(text) - 3) % 5]) for text in texts]
    lengths = [row[row > 0] for row in lengths]
    batch, targets = pack_documents(texts, lengths, num_tokens=260, num_patches=60)
    batch, targets = batch.to(DEVICE), targets.to(DEVICE)
    model = BLT(config, attention_backend="sdpa").to(DEVICE)

    def gradients() -> list[Tensor]:
        loss = cross_entropy_sum(model(batch), targets)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    return model, gradients


def test_a_model_compiled_and_not(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gradients = small_work(rng)
    monkeypatch.setattr("blt_model.segments.takes_kernels", lambda tensor: False)
    wanted = gradients()
    monkeypatch.setattr("blt_model.segments.takes_kernels", lambda tensor: True)
    plain = gradients()
    for module in model.modules():
        if isinstance(module, (BytesReadPatches, PatchesReadBytes)):
            module.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for found in (plain, gradients()):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
