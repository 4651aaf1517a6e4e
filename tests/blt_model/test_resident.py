"""A stack in one launch against float64: the kernel itself, on CUDA or with CUDA's threads as fibers of the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blt_model import TransformerConfig
from blt_model.caches import AttentionCache
from blt_model.errors import ModelError
from blt_model.generation import machine_code, resident
from blt_model.generation.absorbed import AbsorbedPatch, absorbed_weights
from blt_model.generation.machine_code import compiles_for
from blt_model.generation.resident import Parts, ResidentStack, StackTables, Tap
from blt_model.generation.steps import BlockStep, CrossStep, Norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).resolve().parent
SMALL = TransformerConfig(dim=64, num_layers=3, num_heads=4, ffn_dim=96, window=24)
FIRST = replace(SMALL, num_layers=1)
CHUNKS = TransformerConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=2056, window=24)
WIDE = TransformerConfig(dim=1152, num_layers=1, num_heads=9, ffn_dim=64, window=None)


class Stack:
    """A stack of random weights, in half precision and the same in float64."""

    def __init__(
        self, config: TransformerConfig, dtype: torch.dtype, device: str, *, crossed: tuple[int, ...], vectors: int = 2
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.crossed, self.vectors = crossed, vectors
        self.blocks = [self._block() for _ in range(config.num_layers)]
        self.crosses = {layer: self._cross() for layer in crossed}
        shape = (len(crossed), 1, config.num_heads, vectors, config.head_dim)
        self.patch = (self.numbers(*shape), self.numbers(*shape))
        self.cache = AttentionCache(config, 1, dtype=dtype, device=self.device, capacity=32)
        self.wide_cache = AttentionCache(config, 1, dtype=torch.float64, device=torch.device("cpu"), capacity=32)

    def numbers(self, *shape: int) -> Tensor:
        numbers: Tensor = torch.randn(shape, device=self.device).to(self.dtype)
        return numbers

    def _map(self, outputs: int, inputs: int) -> Tensor:
        weight: Tensor = torch.randn(outputs, inputs, device=self.device) / inputs**0.5
        return weight.to(self.dtype)

    def _norm(self) -> Norm:
        return Norm((torch.rand(self.config.dim, device=self.device) + 0.5).to(self.dtype), 1e-5)

    def _block(self) -> BlockStep:
        dim, hidden, heads = self.config.dim, self.config.feed_forward_dim, self.config.num_heads
        maps = self._map(3 * dim, dim), self._map(dim, dim), self._map(2 * hidden, dim), self._map(dim, hidden)
        head_dim = self.config.head_dim
        return BlockStep(self._norm(), maps[0], maps[1], self._norm(), maps[2], maps[3], heads, heads, head_dim)

    def _cross(self) -> CrossStep:
        dim = self.config.dim
        maps = self._map(dim, dim), self._map(2 * dim, dim), self._map(dim, dim)
        return CrossStep(self._norm(), self._norm(), *maps, self.config.head_dim, 2)

    def parts(self) -> Parts:
        patch = self.absorbed() if self.crossed else None
        return Parts(blocks=self.blocks, caches=[self.cache], crosses=self.crosses, patch=patch, tap=self.tap)

    def absorbed(self) -> AbsorbedPatch:
        """The patch as the kernel reads it."""
        keys, values = (part[:, 0].double() for part in self.patch)
        weights = absorbed_weights(list(self.crosses.values()))
        patch, weights = AbsorbedPatch.empty(weights, self.vectors), weights.double()
        scale, scores = self.config.head_dim**-0.5, slice(patch.scores)
        patch.keys[:, scores] = torch.einsum("lhke,lhed->lhkd", keys, scale * weights[0]).flatten(1, 2).to(self.dtype)
        answers = torch.einsum("lhke,lhed->lhkd", values, weights[1]).flatten(1, 2)
        patch.values[:, :, scores] = answers.transpose(1, 2).to(self.dtype)
        return patch

    def taps(self) -> Tap | None:
        """Fresh room for the tapped output."""
        if self.tap < 0:
            return None
        rows = torch.zeros(3, self.config.dim, dtype=self.dtype, device=self.device)
        return Tap(torch.zeros_like(rows[:1]), rows, torch.tensor([1], device=self.device))

    @property
    def tap(self) -> int:
        """The layer that is tapped: the first of several."""
        return 0 if self.config.num_layers > 1 else -1

    def fill(self, position: int) -> None:
        """Random keys and values of all positions before one, in both caches."""
        # Room for the tokens of several launches.
        self.wide_cache.reserve(position + 8)
        self.cache.reserve(position + 8)
        for name in ("keys", "values"):
            narrow, wide = getattr(self.cache, name), getattr(self.wide_cache, name)
            # What has not been written may hold anything.
            narrow.fill_(torch.nan)
            held = min(position, self.cache.capacity)
            narrow[:, :, :, :held] = self.numbers(*narrow.shape)[:, :, :, :held]
            wide[:, :, :, :held] = narrow[:, :, :, :held].double().cpu()

    def expected(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """The outputs of the tapped layer and the last in float64, which advance its cache."""
        step = self.wide_cache.plan(torch.tensor([position]).numpy())
        x = tapped = x.double().cpu()
        for layer, block in enumerate(self.blocks):
            cross = self.crosses.get(layer)
            if cross is not None:
                index = self.crossed.index(layer)
                keys, values = (part[index].double().cpu() for part in self.patch)
                x = _wide_cross(cross)(x[:, None], keys, values).squeeze(1)
            x = _wide_block(block)(x, self.wide_cache, layer, step)
            tapped = x if layer == self.tap else tapped
        return tapped, x


def _wide_norm(norm: Norm) -> Norm:
    return Norm(norm.weight.double().cpu(), norm.eps)


def _wide_block(block: BlockStep) -> BlockStep:
    return replace(
        block,
        attention_norm=_wide_norm(block.attention_norm),
        query_key_value=block.query_key_value.double().cpu(),
        output=block.output.double().cpu(),
        feed_forward_norm=_wide_norm(block.feed_forward_norm),
        gate_value=block.gate_value.double().cpu(),
        feed_forward_output=block.feed_forward_output.double().cpu(),
    )


def _wide_cross(cross: CrossStep) -> CrossStep:
    return replace(
        cross,
        query_norm=_wide_norm(cross.query_norm),
        query=cross.query.double().cpu(),
        output=cross.output.double().cpu(),
    )


class Emulator:
    """Compiles and runs the kernel on the CPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[resident.Sizes, ctypes.CDLL] = {}

    def run(
        self,
        tables: StackTables,
        x: Tensor,
        position: int,
        programs: int,
        seed: int,
        tap: Tap | None,
        skipped: Tensor | None = None,
    ) -> Tensor:
        """One token through a stack, [1, dim]."""
        out = torch.full_like(x, torch.nan)
        at = torch.tensor([position])
        run = self._library(tables.sizes).run
        run.argtypes = (ctypes.c_int, ctypes.c_uint, *resident.ARGUMENTS)
        run.restype = ctypes.c_char_p
        failure = run(programs, seed, *tables.arguments(x, out, at, programs, tap, skipped))
        assert failure is None, failure.decode()
        return out

    def _library(self, sizes: resident.Sizes) -> ctypes.CDLL:
        if sizes not in self._libraries:
            path = self._folder / f"resident{len(self._libraries)}.so"
            with resources.as_file(resources.files("blt_model.generation")) as folder:
                command = ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{HERE}"]
                command += [f"-D{name}={value}" for name, value in sizes.macros().items()]
                subprocess.run([*command, "-o", path, HERE / "resident_emulated.cpp"], check=True)
            self._libraries[sizes] = ctypes.CDLL(str(path))
        return self._libraries[sizes]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return Emulator(tmp_path_factory.mktemp("emulated"))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def check(stack: Stack, position: int, run: Callable[[Tensor, Tap | None], Tensor]) -> None:
    """A token's output, what it leaves in the cache, and what is tapped."""
    x, tap, limit = stack.numbers(1, stack.config.dim), stack.taps(), LIMITS[stack.dtype]
    tapped, wanted = stack.expected(x, position)
    assert relative(run(x, tap), wanted) < limit
    if tap is not None:
        assert relative(tap.out, tapped) < limit
        # One row and no other.
        assert torch.equal(tap.rows[1:2], tap.out)
        assert not tap.rows[::2].any()
    slot = position % stack.cache.capacity
    for narrow, wide in ((stack.cache.keys, stack.wide_cache.keys), (stack.cache.values, stack.wide_cache.values)):
        assert relative(narrow[:, :, :, slot], wide[:, :, :, slot]) < limit


LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
# The usual manner, and others: one slot under way or all, and many slots or few.
MANNERS = (None, resident.Manner(slot=16_384, in_flight=1), resident.Manner(slot=65_536, in_flight=0))
CASES = [
    # Over the end of the window and with several launches, whose programs differ in number.
    (SMALL, torch.float16, (0, 2), 22, (2, 3, 1, 2)),
    (FIRST, torch.float16, (), 0, (2, 2)),
    (CHUNKS, torch.bfloat16, (), 7, (2, 3)),
    # Parts of several blocks of keys, and a row of several chunks.
    (WIDE, torch.bfloat16, (), 400, (3,)),
]


@pytest.mark.parametrize("case", CASES)
def test_equals_blocks_in_float64(
    emulator: Emulator,
    case: tuple[TransformerConfig, torch.dtype, tuple[int, ...], int, tuple[int, ...]],
) -> None:
    config, dtype, crossed, position, launches = case
    stack = Stack(config, dtype, "cpu", crossed=crossed)
    stack.fill(position)
    tables = [StackTables(stack.parts(), manner) for manner in MANNERS]
    for turn, programs in enumerate(launches):

        def run(x: Tensor, tap: Tap | None, turn: int = turn, programs: int = programs) -> Tensor:
            return emulator.run(tables[turn % len(tables)], x, position + turn, programs, turn, tap)

        check(stack, position + turn, run)


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_skipped_launch_does_nothing(emulator: Emulator, in_flight: int) -> None:
    """Nor does it keep the next one from doing what it would have done."""
    stack = Stack(SMALL, torch.bfloat16, "cpu", crossed=())
    stack.fill(5)
    tables = StackTables(stack.parts(), resident.Manner(slot=8_192, in_flight=in_flight))
    check(stack, 5, lambda x, tap: emulator.run(tables, x, 5, 3, 0, tap))
    kept = [tensor.clone() for tensor in (tables.exchange, tables.state, stack.cache.keys, stack.cache.values)]
    tap, x = stack.taps(), stack.numbers(1, SMALL.dim)
    out = emulator.run(tables, x, 6, 3, 1, tap, torch.tensor([1]))
    assert tap is not None
    assert out.isnan().all()
    assert not tap.out.any()
    for tensor, value in zip((tables.exchange, tables.state, stack.cache.keys, stack.cache.values), kept, strict=True):
        assert torch.equal(tensor.nan_to_num(), value.nan_to_num())
    check(stack, 6, lambda x, tap: emulator.run(tables, x, 6, 3, 2, tap, torch.tensor([0])))


@pytest.mark.parametrize(("vectors", "scores"), [(9, 36), (1, 4)])
def test_reads_patches_of_many_vectors(emulator: Emulator, vectors: int, scores: int) -> None:
    """Scores that fill more than the matrix units take at once, or less, and answers of several slots."""
    config = TransformerConfig(dim=256, num_layers=1, num_heads=4, ffn_dim=64, window=24)
    stack = Stack(config, torch.bfloat16, "cpu", crossed=(0,), vectors=vectors)
    stack.fill(5)
    tables = StackTables(stack.parts(), resident.Manner(slot=8_192, in_flight=1))
    assert tables.sizes.scores == scores
    check(stack, 5, lambda x, tap: emulator.run(tables, x, 5, 2, vectors, tap))


LATENT = TransformerConfig(dim=2048, num_layers=3, num_heads=16, ffn_dim=5632)
LOCAL = TransformerConfig(dim=1024, num_layers=3, num_heads=16, ffn_dim=2816, window=512)
ENTROPY = TransformerConfig(dim=768, num_layers=3, num_heads=12, ffn_dim=2048, window=512)
ON_CUDA = [
    *((config, crossed, position) for config, _, crossed, position, _ in CASES),
    (LATENT, (), 0),
    (LATENT, (), 300),
    (LATENT, (), 2_000),
    (LOCAL, (0, 1, 2), 100),
    (LOCAL, (0, 2), 511),
    (ENTROPY, (), 5_000),
]


def test_what_does_not_fit_is_refused() -> None:
    """Widths that leave rings no room for two stages would have warps wait for ever."""
    with torch.device("meta"):
        small, huge = (
            Stack(config, torch.bfloat16, "meta", crossed=()).parts()
            for config in (LATENT, TransformerConfig(dim=8192, num_layers=1, num_heads=64, ffn_dim=28_672))
        )
    assert small.fit()
    assert not huge.fit()
    assert huge.sizes().slots < 2
    odd = replace(SMALL, num_heads=8, num_kv_heads=4)
    assert not resident.fits(odd)


def test_compiles_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NVRTC, which needs no GPU, at the sizes of the presets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not compiles_for(90):
        pytest.skip("this NVRTC is not at hand, or knows no Hopper")
    for config, crossed in ((LATENT, ()), (LOCAL, (0, 1, 2)), (ENTROPY, ())):
        sizes = StackTables(Stack(config, torch.bfloat16, "cpu", crossed=crossed).parts()).sizes
        assert resident.compiled(sizes, 90).startswith(b"\x7fELF")
    stamped = replace(sizes, manner=replace(sizes.manner, stamps=True))
    assert len(resident.compiled(stamped, 90)) > len(resident.compiled(sizes, 90))
    with pytest.raises(ModelError, match="NVRTC cannot compile"):
        resident.compiled(replace(sizes, layers=10_000), 90)
    assert not compiles_for(1)


def test_machine_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk, so that the next process does not compile; what is broken there, or cannot be kept, is compiled."""
    if not compiles_for(90):
        pytest.skip("this NVRTC is not at hand, or knows no Hopper")
    compiles = machine_code._compiled
    compiled: list[str] = []

    def count(source: str, options: list[str]) -> bytes:
        compiled.append(source)
        return compiles(source, options)

    monkeypatch.setattr(machine_code, "_compiled", count)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = 'extern "C" __global__ void fill(int* x) { *x = NUMBER; }'
    first = machine_code.machine_code(source, {"NUMBER": 1}, 90)
    assert machine_code.machine_code(source, {"NUMBER": 1}, 90) == first
    assert len(compiled) == 1
    assert machine_code.machine_code(source, {"NUMBER": 2}, 90) != first
    assert len(compiled) == 2
    for path in (tmp_path / "blt-model").iterdir():
        assert path.suffix == ".cubin"
        path.write_bytes(path.read_bytes()[:-1])
    assert machine_code.machine_code(source, {"NUMBER": 1}, 90) == first
    assert len(compiled) == 3
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine_code.machine_code(source, {"NUMBER": 1}, 90) == first
    assert len(compiled) == 4


def test_launches_where_the_driver_refuses_to_begin_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once; any other failure is reported."""
    driver = pytest.importorskip("cuda.bindings.driver")
    outcomes, asked = driver.CUresult, []

    def launch(configuration: Any, function: object, arguments: object, extra: int) -> tuple[Any]:
        asked.append((configuration.gridDimX, configuration.numAttrs))
        return (outcomes.CUDA_ERROR_NOT_SUPPORTED if configuration.numAttrs == 2 else outcomes.CUDA_SUCCESS,)

    monkeypatch.setattr(driver, "cuLaunchKernelEx", launch)
    monkeypatch.setattr(resident, "_NOT_EARLY", set())
    stream = SimpleNamespace(cuda_stream=0, device_index=0)
    for programs in (3, 4):
        resident._launch((0, 1024), programs, (), stream)  # type: ignore[arg-type]  # there is no stream without CUDA
    assert asked == [(3, 2), (3, 1), (4, 1)]
    monkeypatch.setattr(driver, "cuLaunchKernelEx", lambda *arguments: (outcomes.CUDA_ERROR_ILLEGAL_ADDRESS,))
    for device in (0, 1):
        stream.device_index = device
        with pytest.raises(ModelError, match="ILLEGAL_ADDRESS"):
            resident._launch((0, 1024), 3, (), stream)  # type: ignore[arg-type]
    assert list(resident._NOT_EARLY) == [0]


@pytest.mark.skipif(not resident.available(torch.device(DEVICE)), reason="needs a GPU of compute capability 9")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("config", "crossed", "position"), ON_CUDA)
def test_equals_blocks_in_float64_on_cuda(
    config: TransformerConfig, crossed: tuple[int, ...], position: int, dtype: torch.dtype
) -> None:
    stack = Stack(config, dtype, "cuda", crossed=crossed)
    stack.fill(position)
    run = ResidentStack(stack.parts())
    for turn, programs in enumerate((0, 66, 1, 131, 0)):
        at = torch.tensor([position + turn], device="cuda")

        def twice(x: Tensor, tap: Tap | None, at: Tensor = at, programs: int = programs) -> Tensor:
            skipped = torch.ones(1, dtype=torch.int64, device="cuda")
            run(x, at, programs, tap, skipped)
            found = run(x, at, programs, tap, skipped - 1)
            assert torch.equal(run(x, at, programs, tap), found)
            return found

        check(stack, position + turn, twice)
