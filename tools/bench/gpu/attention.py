"""Self-attention over packed documents: every backend's result, speed, and the tiles of our own kernels.

    python -m tools.bench.gpu.attention
    python -m tools.bench.gpu.attention --tune --budget 100
    python -m tools.bench.gpu.attention --cases flex

- *local*: byte layers of a `blt-1b`, documents of some 1,000 bytes, window 512.
- *latent*: its patches, no window.
- *entropy*: a window of the entropy job, with the keys carried over; forward only.

Errors are against float64 over some documents of the pack, relative over all entries. Operations are those that the
documents and the window ask for: 4 for a pair of query and key and a number of a head forward, 10 backward. Times are
of the GPU alone, from a replayed graph of calls. FlexAttention runs only where `--cases` names it. `--tune` times our
kernels with many ways to cut the work instead; each is compiled first, in threads. On the CPU our kernels run under
TRITON_INTERPRET=1 only. The last line is JSON. Exits with 1 if an error is beyond its limit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tools.bench.gpu.harness import Row, Settings, median_seconds, report, settings
from torch import Tensor

from blt_model.attention import AttentionBackend, AttentionPlan, attend, plan_attention, resolve_backend
from blt_model.errors import ModelError
from blt_model.flex_backend import first_keys
from blt_model.tile_attention import Bounds

if TYPE_CHECKING:
    from blt_model.tile_kernels import Launch, Tiles

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
CALLS = 10
"""Calls of a graph, so that starting it counts for little."""
TOP = 6
"""Ways to cut the work that are shown of each kernel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is attended to."""

    name: str
    tokens: int
    heads: int
    width: int
    lengths: tuple[int, int]
    """Shortest and longest document."""
    window: int | None
    carried: int = 0
    backward: bool = True


SHAPES = (
    Shape(name="local", tokens=32_768, heads=16, width=64, lengths=(200, 1_800), window=512),
    Shape(name="latent", tokens=7_300, heads=16, width=128, lengths=(10, 2_000), window=None),
    Shape(
        name="entropy", tokens=16_384, heads=12, width=64, lengths=(200, 4_000), window=512, carried=512, backward=False
    ),
)
TINY_SHAPES = (
    Shape(name="local", tokens=60, heads=2, width=16, lengths=(5, 30), window=12),
    Shape(name="latent", tokens=40, heads=2, width=16, lengths=(1, 30), window=None),
    Shape(name="entropy", tokens=40, heads=1, width=16, lengths=(5, 30), window=16, carried=16, backward=False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A shape filled with random numbers; query and key are views of one matrix, as a model has them."""

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    offsets: list[int]
    first: Tensor

    @classmethod
    def of(cls, shape: Shape, run: Settings, rng: np.random.Generator) -> Problem:
        """Fresh documents and numbers."""
        dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        offsets = [0]
        while offsets[-1] < shape.tokens:
            offsets.append(min(shape.tokens, offsets[-1] + int(rng.integers(shape.lengths[0], shape.lengths[1] + 1))))
        total = shape.carried + shape.tokens
        flat = torch.randn(total, 2 * shape.heads, shape.width, device=run.device).to(dtype)
        value = torch.randn(total, 3 * shape.heads, shape.width, device=run.device).to(dtype)[:, 2 * shape.heads :]
        queries = torch.tensor(offsets, dtype=torch.int32, device=run.device)
        keys = queries + shape.carried
        keys[0] = 0
        first = first_keys(queries, keys, shape.tokens, shape.carried, shape.window)
        return cls(
            shape=shape,
            query=flat[shape.carried :, : shape.heads],
            key=flat[:, shape.heads :],
            value=value,
            upstream=torch.randn(shape.tokens, shape.heads, shape.width, device=run.device).to(dtype),
            offsets=offsets,
            first=first,
        )

    def plan(self, backend: AttentionBackend) -> AttentionPlan:
        """For a backend."""
        device, carried = self.query.device, self.shape.carried
        return plan_attention(
            torch.tensor(self.offsets, dtype=torch.int32, device=device),
            self.shape.tokens,
            window=self.shape.window,
            backend=backend,
            max_length=max(np.diff(self.offsets).tolist()),
            carried=carried,
            carried_valid=torch.tensor(carried, device=device) if carried else None,
        )

    def operations(self, backward: bool) -> float:
        """Of a call."""
        reads = torch.arange(self.shape.tokens, device=self.first.device) + self.shape.carried + 1 - self.first
        return (14 if backward else 4) * float(reads.sum()) * self.shape.width * self.shape.heads

    def sample(self) -> tuple[int, int]:
        """A run of queries, whole documents of some 1,500 tokens; with carried keys the first, else in the middle."""
        index = 0 if self.shape.carried else len(self.offsets) // 2 - 1
        begin = self.offsets[index]
        end = next((offset for offset in self.offsets if offset >= begin + 1_500), self.offsets[-1])
        return begin, end

    def reference(self) -> list[Tensor]:
        """Result, and gradients where they count, of the sample in float64."""
        begin, end = self.sample()
        carried, low = self.shape.carried, self.shape.carried + begin if begin else 0
        high = carried + end
        tensors = self.query[begin:end], self.key[low:high], self.value[low:high]
        query, key, value = leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
        places = torch.arange(low, high, device=query.device)
        own = torch.arange(carried + begin, high, device=query.device)
        allowed = (places >= self.first[begin:end, None]) & (places <= own[:, None])
        scores = torch.einsum("ihe,jhe->hij", query, key) * self.shape.width**-0.5
        result = torch.einsum("hij,jhe->ihe", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value)
        if not self.shape.backward:
            return [result.detach()]
        gradients = torch.autograd.grad(result, leaves, self.upstream[begin:end].double())
        return [result.detach(), *gradients]

    def error(self, results: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
        """The largest of results and gradients."""
        begin, end = self.sample()
        low = self.shape.carried + begin if begin else 0
        runs = [slice(begin, end)] * 2 + [slice(low, self.shape.carried + end)] * 2
        parts = [result[run] for result, run in zip(results, runs, strict=False)]
        return max(_error(part, wanted) for part, wanted in zip(parts, reference, strict=True))


def _error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.detach().double() - reference).norm() / reference.norm())


def graph_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call on the GPU; on the CPU, of a plain call."""
    if device.type != "cuda":
        return median_seconds(function, device, repeats=1, warmup=0)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with torch.cuda.stream(side):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    return median_seconds(graph.replay, device, repeats=7, warmup=2) / CALLS


def backends(run: Settings) -> list[AttentionBackend]:
    """Those that run here and were asked for."""
    if run.device.type == "cpu":
        interprets = os.environ.get("TRITON_INTERPRET") == "1"
        return [AttentionBackend.SDPA, *([AttentionBackend.TRITON] if interprets else [])]
    wanted = [AttentionBackend.TRITON, AttentionBackend.VARLEN]
    if "flex" in run.cases:
        wanted.append(AttentionBackend.FLEX)
    return [backend for backend in wanted if _runs(backend, run.device)]


def _runs(backend: AttentionBackend, device: torch.device) -> bool:
    try:
        resolve_backend(backend, device, torch.bfloat16)
    except ModelError as error:
        print(error)
        return False
    return True


def compare(problem: Problem, backend: AttentionBackend, reference: Sequence[Tensor]) -> Row:
    """Error and speed of a backend."""
    plan, shape = problem.plan(backend), problem.shape
    tensors = problem.query, problem.key, problem.value
    query, key, value = leaves = [tensor.detach().requires_grad_(shape.backward) for tensor in tensors]

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(query, key, value, plan)

    def both() -> list[Tensor]:
        result = attend(query, key, value, plan)
        return [result, *torch.autograd.grad(result, leaves, problem.upstream)]

    results = both() if shape.backward else [forward()]
    error = problem.error(results, reference)
    row: Row = {"shape": shape.name, "backend": str(backend), "error": error, "ok": error < LIMITS[query.dtype]}
    for name, function, backward in (("forward", forward, False), ("both", both, True)):
        if backward and not shape.backward:
            continue
        seconds = graph_seconds(function, query.device)
        row[f"{name} ms"] = 1e3 * seconds
        row[f"{name} TFLOP/s"] = problem.operations(backward) / seconds / 1e12
    return row


def candidates(kernel: str, width: int) -> list[Tiles]:
    """Ways to cut the work of a kernel that leave no register unheld, as far as compiling for an H200 tells."""
    from blt_model.tile_kernels import Tiles

    wide = width > 64
    sizes: dict[str, list[tuple[int, int, int]]] = {
        "forward": [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 32, 4)],
        "query gradient": [(64, 64, 4), (64, 32, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8)],
        "key gradient": [(32, 64, 4), (64, 64, 4), (32, 128, 8), (64, 128, 8), (128, 64, 8), (128, 128, 8)],
    }
    if wide:
        sizes = {
            "forward": [(64, 64, 4), (64, 32, 4), (64, 128, 8), (128, 32, 8), (128, 64, 8), (128, 128, 8)],
            "query gradient": [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8), (64, 128, 8)],
            "key gradient": [(32, 64, 4), (32, 64, 8), (64, 64, 8), (32, 128, 8), (64, 128, 8), (16, 64, 4)],
        }
    ways = itertools.product(sizes[kernel], (2, 3), (False, True))
    tiles = [Tiles(queries=q, keys=k, warps=w, stages=s, one_loop=one) for (q, k, w), s, one in ways]
    return [*tiles, *(Tiles(queries=q, keys=k, warps=w, stages=2, bulk=False) for q, k, w in sizes[kernel][:4])]


def launches(problem: Problem) -> dict[str, Callable[[Tiles], Launch]]:
    """The kernels of a problem, ready to run but for the tiles."""
    from blt_model import tile_kernels as kernels

    query, key, value = problem.query, problem.key, problem.value
    bounds = Bounds.of(problem.first, problem.shape.carried)
    output, sums = kernels.forward(query, key, value, problem.first)
    gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)]
    deltas, upstream, inputs = torch.zeros_like(sums), problem.upstream, (query, key, value)

    def key_gradient(tiles: Tiles) -> Launch:
        written = (gradients[1], gradients[2])
        return kernels.key_gradient_launch((*inputs, bounds.ends), sums, upstream, deltas, written, tiles)

    return {
        "forward": lambda tiles: kernels.forward_launch(*inputs, problem.first, output, sums, tiles),
        "query gradient": lambda tiles: kernels.query_gradient_launch(
            (*inputs, problem.first), (output, sums), upstream, gradients[0], deltas, tiles
        ),
        "key gradient": key_gradient,
    }


def tune(problems: Sequence[Problem], run: Settings) -> list[Row]:
    """The fastest tiles of every kernel and shape; all are compiled at once before any is timed."""
    jobs: list[tuple[Problem, str, Tiles, Launch]] = []
    for problem in problems:
        for kernel, make in launches(problem).items():
            if kernel == "forward" or problem.shape.backward:
                jobs += [(problem, kernel, way, make(way)) for way in candidates(kernel, problem.shape.width)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(lambda job: _compiled(job[3]), jobs))
    print(f"{len(jobs)} kernels compiled, {run.left:.0f} s left", flush=True)
    rows: list[Row] = []
    for (problem, kernel, way, launch), failure in zip(jobs, compiled, strict=True):
        row: Row = {"shape": problem.shape.name, "kernel": kernel}
        row |= {"queries": way.queries, "keys": way.keys, "warps": way.warps, "stages": way.stages}
        row |= {"one_loop": way.one_loop, "bulk": way.bulk}
        if failure is None and run.left > 0:
            try:
                made = launch.kernel[(launch.programs,)](*launch.arguments, **launch.options)
                row |= {"registers": made.n_regs, "spills": made.n_spills, "shared": made.metadata.shared}
                row["ms"] = 1e3 * graph_seconds(launch.run, run.device)
            except Exception as error:
                failure = str(error)
        rows.append(row if failure is None else {**row, "failure": failure[:60]})
    return _best(rows)


def _compiled(launch: Launch) -> str | None:
    """Compile without running; what went wrong."""
    try:
        launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _best(rows: Sequence[Row]) -> list[Row]:
    """The fastest few of every kernel, and what failed."""
    result: list[Row] = []
    for key in dict.fromkeys((row["shape"], row["kernel"]) for row in rows):
        timed = [row for row in rows if (row["shape"], row["kernel"]) == key and "ms" in row]
        result += sorted(timed, key=lambda row: float(row["ms"]))[:TOP]
    return [*result, *(row for row in rows if "failure" in row)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and time, or tune."""
    help_ = "Time ways to cut our kernels' work instead."
    run = settings(__doc__, arguments, budget=90, switches={"tune": help_})
    seed = int(os.environ.get("BLT_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"BLT_TEST_SEED={seed}")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shapes = [shape for shape in (TINY_SHAPES if run.tiny else SHAPES) if _wanted(shape, run)]
    problems = [Problem.of(shape, run, rng) for shape in shapes]
    if "tune" in run.switches and run.device.type != "cuda":
        raise SystemExit("there is nothing to tune without a CUDA device")
    if "tune" in run.switches:
        rows: list[Any] = tune(problems, run)
    else:
        rows = []
        for problem in problems:
            reference = problem.reference()
            rows += [compare(problem, backend, reference) for backend in backends(run) if run.left > 0]
    report("attention", run, rows, seed=seed)
    if not all(row.get("ok", True) for row in rows):
        raise SystemExit(1)


def _wanted(shape: Shape, run: Settings) -> bool:
    """Whether a shape was asked for; "flex" is no shape."""
    names = [case for case in run.cases if case != "flex"]
    return not names or any(name in shape.name for name in names)


if __name__ == "__main__":
    main()
