"""Linear maps of one row: ways to launch their kernel, from replayed graphs.

    python -m tools.bench.gpu.matvec
    python -m tools.bench.gpu.matvec --cases latent/gate,chain

- *latent*, *local*, *entropy*: the maps of a block of `blt-1b`'s latent transformer, of its byte layers and of
  `entropy-100m`, in many shapes. A graph goes through many matrices, more than the level 2 cache holds, so that each
  launch depends on the one before it as in a model. `usual` is what the model takes.
- *chain*: all four maps of a block after one another, in every layer.

Shapes read `rows x chunk, warps, ahead`. Figures are microseconds a launch, and the share of the bandwidth of a large
copy at which weights were read. Errors are against float64. Kernels are compiled first, in threads. On the CPU they run
under TRITON_INTERPRET=1 only; without it only torch's own products are timed. The last line is JSON. Exits with 1 if an
error is beyond its limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from tools.bench.gpu.harness import Row, Settings, copy_bandwidth, replayed_seconds, report, settings
from torch import Tensor

if TYPE_CHECKING:
    from blt_model.generation.linear_kernels import LinearShape

LIMIT = 1e-2
LEAST_BYTES = 250_000_000
"""Of the matrices of a graph, several times the level 2 cache."""
EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Map:
    """A linear map of a block."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False
    heads: int = 0
    """Of attention, whose parts the map joins; 0 where it takes a plain row."""

    @property
    def words(self) -> int:
        """Words of 32 bits of an output's weights in half precision."""
        return self.inputs // 2

    @property
    def has_norm(self) -> bool:
        """Whether it comes first in its half of the block; else it ends it, with the residual."""
        return self.name.endswith(("qkv", "gate"))


def block_maps(name: str, dim: int, hidden: int, heads: int) -> list[Map]:
    """The four maps of a block in their order."""
    return [
        Map(name=f"{name}/qkv", outputs=3 * dim, inputs=dim),
        Map(name=f"{name}/output", outputs=dim, inputs=dim, heads=heads),
        Map(name=f"{name}/gate", outputs=hidden, inputs=dim, gated=True),
        Map(name=f"{name}/down", outputs=dim, inputs=hidden),
    ]


BLOCKS = {
    "latent": block_maps("latent", 2048, 5632, 16),
    "local": block_maps("local", 1024, 2816, 16),
    "entropy": block_maps("entropy", 768, 2048, 12),
}
TINY_BLOCKS = {"latent": block_maps("latent", 64, 96, 2)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A map filled with random numbers, many times."""

    map: Map
    weights: list[Tensor]
    norm: Tensor
    x: Tensor
    parts: Tensor
    stats: Tensor
    residual: Tensor

    @classmethod
    def of(cls, one: Map, run: Settings, count: int | None = None) -> Problem:
        """Fresh numbers; as many matrices as `LEAST_BYTES` asks for unless a count is given."""
        device, half = run.device, half_dtype(run)
        rows, width = one.outputs * (2 if one.gated else 1), one.inputs // max(one.heads, 1)
        least = 2 if run.tiny else max(16, -(-LEAST_BYTES // (rows * one.inputs * 2)))

        def made(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        return cls(
            map=one,
            weights=[(made(rows, one.inputs) / one.inputs**0.5).to(half) for _ in range(count or least)],
            norm=made(one.inputs).to(half),
            x=made(1, one.inputs).to(half),
            parts=made(1, 4, max(one.heads, 1), width),
            stats=torch.stack([made(1, 4, max(one.heads, 1)), made(1, 4, max(one.heads, 1)).abs() + 0.5], dim=-1),
            residual=made(1, one.outputs).to(half),
        )

    def call(
        self,
        weight: Tensor,
        shape: LinearShape | None,
        *,
        x: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The kernel on a matrix, with all that comes with the map."""
        from blt_model.generation.linear_kernels import linear

        one, x = self.map, self.x if x is None else x
        if one.has_norm:
            return linear(x, weight, norm=self.norm, eps=EPS, gated=one.gated, shape=shape)
        stats = self.stats if one.heads else None
        source = self.parts if one.heads else x
        residual = self.residual if residual is None else residual
        return linear(source, weight, stats=stats, residual=residual, shape=shape)

    def plain(self, weight: Tensor) -> Tensor:
        """The same by torch, without what comes before."""
        if self.map.gated:
            gate, value = F.linear(self.x, weight).chunk(2, dim=-1)
            return F.silu(gate) * value
        return F.linear(self.x, weight)

    def expected(self, weight: Tensor) -> Tensor:
        """The result in float64."""
        x = self.x.double()
        if self.map.has_norm:
            x = F.rms_norm(x, x.shape[1:], self.norm.double(), EPS)
        elif self.map.heads:
            best, mass = self.stats.double().unbind(-1)
            shares = (best - best.amax(1, keepdim=True)).exp()
            joined = (shares[..., None] * self.parts.double()).sum(1) / (shares * mass).sum(1)[..., None]
            x = joined.flatten(1)
        products = x @ weight.double().T
        if self.map.gated:
            return F.silu(products[:, : self.map.outputs]) * products[:, self.map.outputs :]
        return products if self.map.has_norm else products + self.residual.double()

    def chain(self, shape: LinearShape | None) -> None:
        """All matrices after one another, each on what the one before gave where that is long enough."""
        x = self.x
        for weight in self.weights:
            out = self.call(weight, shape, x=x)
            x = out[:, : self.map.inputs] if self.map.outputs >= self.map.inputs else self.x


def half_dtype(run: Settings) -> torch.dtype:
    """The dtype of weights; the interpreter knows no bfloat16."""
    return torch.bfloat16 if run.device.type == "cuda" else torch.float16


def relative(found: Tensor, wanted: Tensor) -> float:
    """The error of a result over all its entries."""
    return float((found.double() - wanted).norm() / wanted.norm())


def has_kernels(run: Settings) -> bool:
    """Whether our kernels run on the device."""
    return run.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def independent() -> Iterator[None]:
    """Let kernels wait until those before them have ended, and begin then."""
    from blt_model.generation import kernels

    kernels.DEPENDENT = False
    try:
        yield
    finally:
        kernels.DEPENDENT = True


def before(one: Map) -> LinearShape:
    """The first shape that was taken: four warps beside one another, one chunk before the wait."""
    from blt_model.generation.linear_kernels import LinearShape

    if one.heads:
        return replace(usual(one), rows=4 if one.outputs <= 1024 else 8)
    chunk = max(128, min(512, one.words & -one.words))
    return LinearShape(rows=4 if one.gated or one.outputs <= 1024 else 8, chunk=chunk, warps=4, ahead=1)


def usual(one: Map) -> LinearShape:
    """What the model takes."""
    from blt_model.generation.linear_kernels import linear_shape

    return linear_shape(one.outputs, one.words, gated=one.gated, joined=one.heads > 0)


def candidates(one: Map) -> dict[str, LinearShape]:
    """The shapes to time, by name."""
    from blt_model.generation.linear_kernels import LinearShape

    taken = usual(one)
    chunks = -(-one.words // 128)
    found = {"usual": taken, "before": before(one)}
    if one.heads:
        shapes = [replace(taken, rows=rows, warps=warps) for rows in (2, 4, 8, 16) for warps in (4, 8)]
    else:
        found["half ahead"] = replace(taken, ahead=max(1, min(taken.ahead, chunks) // 2))
        forms = ((4, 128, 4), (8, 128, 4), (16, 128, 4), (8, 128, 8), (16, 128, 8), (8, 256, 4), (8, 256, 8))
        shapes = [LinearShape(rows=rows, chunk=chunk, warps=warps, ahead=1) for rows, chunk, warps in forms]
    for shape in shapes:
        each = max(1, shape.rows * shape.chunk // (32 * shape.warps)) * (2 if one.gated else 1)
        ahead = min(-(-one.words // shape.chunk), 96 // each)
        registers = 128 if each * ahead > 64 else None
        fitting = replace(shape, ahead=max(1, ahead), registers=registers)
        if ahead and shape.rows % shape.groups == 0 and fitting not in found.values():
            found[f"{shape.rows} x {shape.chunk}, {shape.warps}, {ahead}"] = fitting
    return found


def compiled(calls: Sequence[Callable[[], object]], run: Settings) -> list[str]:
    """Make calls once, in threads on CUDA; what became of each, empty where all is well."""

    def attempt(call: Callable[[], object]) -> str:
        try:
            call()
        except Exception as error:  # a shape that does not fit is a figure too
            return f"{type(error).__name__}: {str(error)[:80]}"
        return ""

    with ThreadPoolExecutor(os.cpu_count() if run.device.type == "cuda" else 1) as pool:
        return list(pool.map(attempt, calls))


def map_rows(one: Map, run: Settings, bandwidth: float) -> list[Row]:
    """Figures of a map in all shapes."""
    problem = Problem.of(one, run)
    first = problem.weights[0]
    size, count = first.numel() * first.element_size(), len(problem.weights)

    def figures(name: str, seconds: float, error: float | None) -> Row:
        row = {
            "case": one.name,
            "shape": name,
            "us": 1e6 * seconds / count,
            "of_copy": size * count / seconds / bandwidth,
        }
        return {**row, "error": error, "ok": error is None or error < LIMIT}

    rows = [
        figures(
            "torch, map only", replayed_seconds(lambda: [problem.plain(w) for w in problem.weights], run.device), None
        )
    ]
    if not has_kernels(run):
        return rows
    shapes, wanted = candidates(one), problem.expected(first)
    failures = compiled([lambda s=s: problem.call(first, s) for s in shapes.values()], run)  # type: ignore[misc]  # mypy knows no type of s
    for (name, shape), failure in zip(shapes.items(), failures, strict=True):
        if failure:
            rows.append({"case": one.name, "shape": name, "ok": False, "failure": failure})
            continue
        error = relative(problem.call(first, shape), wanted)
        rows.append(figures(name, replayed_seconds(lambda s=shape: problem.chain(s), run.device), error))  # type: ignore[misc]  # mypy knows no type of s
    with independent():
        rows.append(
            figures("usual, one after another", replayed_seconds(lambda: problem.chain(None), run.device), None)
        )
    return sorted(rows, key=lambda row: row.get("us", 0.0))


def block_chain(problems: Sequence[Problem], shapes: Sequence[LinearShape | None]) -> None:
    """Every layer's four maps as a block has them, without attention."""
    qkv, output, gate, down = problems
    x = qkv.x
    for weights in zip(*(problem.weights for problem in problems), strict=True):
        qkv.call(weights[0], shapes[0], x=x)
        x = output.call(weights[1], shapes[1], residual=x)
        hidden = gate.call(weights[2], shapes[2], x=x)
        x = down.call(weights[3], shapes[3], x=hidden, residual=x)


def chain_rows(name: str, maps: Sequence[Map], run: Settings, bandwidth: float) -> list[Row]:
    """Figures of whole blocks without attention."""
    layers = 2 if run.tiny else {"latent": 8, "local": 16, "entropy": 24}[name]
    problems = [Problem.of(one, run, layers) for one in maps]
    size = sum(weight.numel() * weight.element_size() for problem in problems for weight in problem.weights)
    taken = [usual(one) for one in maps]
    ways = {"usual": taken, "before": [before(one) for one in maps]}
    each = [(problem, shape) for shapes in ways.values() for problem, shape in zip(problems, shapes, strict=True)]
    compiled([lambda p=p, s=s: p.call(p.weights[0], s) for p, s in each], run)  # type: ignore[misc]  # mypy knows no type of p and s
    rows: list[Row] = []

    def measure(label: str, shapes: Sequence[LinearShape | None]) -> None:
        seconds = replayed_seconds(lambda: block_chain(problems, shapes), run.device)
        figures = {"us": 1e6 * seconds / (4 * layers), "of_copy": size / seconds / bandwidth}
        rows.append({"case": f"chain/{name}", "shape": label, **figures, "ok": True})

    for label, shapes in ways.items():
        measure(label, shapes)
    with independent():
        measure("usual, one after another", taken)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases for which there is time."""
    run = settings(__doc__, arguments, budget=60)
    bandwidth = copy_bandwidth(run.device)
    torch.manual_seed(0)
    blocks = TINY_BLOCKS if run.tiny else BLOCKS
    rows: list[Row] = []
    with torch.no_grad():
        for name, maps in blocks.items():
            if has_kernels(run) and run.wants(f"chain/{name}"):
                rows += chain_rows(name, maps, run, bandwidth)
        for one in (one for maps in blocks.values() for one in maps):
            if run.wants(one.name):
                rows += map_rows(one, run, bandwidth)
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()
    report("matvec", run, rows, copy_bandwidth=bandwidth)
    if not all(row["ok"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
