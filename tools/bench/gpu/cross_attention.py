"""Cross-attentions between bytes and patches, and pooling: results and speed of our kernels and of torch's operations.

    python -m tools.bench.gpu.cross_attention
    python -m tools.bench.gpu.cross_attention --cases bytes,compiled
    python -m tools.bench.gpu.cross_attention --tune

At the shape of a `blt-1b` micro batch: 32,768 bytes in patches of 4.5, 16 heads of 64 numbers, 2 vectors a patch; and
once more with the last 12,000 bytes in one patch, as padding is. Errors are against float64, the largest of results and
gradients, each relative over all entries. Rates count every input and output once, and what backward reads again. Times
of our kernels are of the GPU alone, from a replayed graph of calls. Torch's operations cannot all be captured in one:
they are timed call by call, as the column "timed" says, with what the host takes where it is slower than the GPU.
Compiled by Inductor, as they were part of compiled models, they run only where `--cases` names "compiled". `--tune`
times our kernels with many ways to cut the work instead. On the CPU our kernels run under TRITON_INTERPRET=1 only. The
last line is JSON. Exits with 1 if an error is beyond its limit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tools.bench.gpu.attention import graph_seconds
from tools.bench.gpu.harness import Row, Settings, copy_bandwidth, median_seconds, report, settings
from tools.bench.gpu.texts import patch_lengths
from torch import Tensor

from blt_model import segment_operators
from blt_model.segments import (
    Segments,
    bytes_read_patches_by_steps,
    patches_read_bytes_by_steps,
    segment_max_by_steps,
    segment_mean_by_steps,
)

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
PATCH_LENGTH = 4.5
TOP = 5
"""Ways to cut the work that are shown of each kernel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a micro batch."""

    tokens: int
    padding: int
    """Bytes of the one long patch of the padded batch."""
    heads: int
    width: int
    vectors: int = 2


FULL = Shape(tokens=32_768, padding=12_000, heads=16, width=64)
TINY = Shape(tokens=60, padding=30, heads=2, width=8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """An operation on random numbers."""

    name: str
    segments: Segments
    leaves: tuple[Tensor, ...]
    upstream: Tensor
    kernels: Callable[..., Tensor]
    steps: Callable[..., Tensor]

    @property
    def forward_bytes(self) -> int:
        """Read and written forward."""
        return sum(tensor.nbytes for tensor in (*self.leaves, self.upstream))

    @property
    def backward_bytes(self) -> int:
        """Read and written backward: a gradient of each input, and what it is made of; a mean needs no values."""
        reads = 0 if self.name.startswith("mean") else sum(leaf.nbytes for leaf in self.leaves)
        kept = self.upstream.nbytes if self.name.startswith(("patches", "maximum")) else 0
        return sum(leaf.nbytes for leaf in self.leaves) + reads + kept + self.upstream.nbytes

    def results(self, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Result and gradients."""
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        result = function(*leaves)
        return [result.detach(), *torch.autograd.grad(result, leaves, self.upstream.to(result.dtype))]


def problems(shape: Shape, run: Settings, rng: np.random.Generator) -> list[Problem]:
    """All operations on patches as they are, and with one long patch at the end."""
    made = []
    for name, padding in (("", 0), (", padded", shape.padding)):
        lengths = patch_lengths(shape.tokens - padding, PATCH_LENGTH, rng)
        offsets = np.concatenate([[0], np.cumsum(lengths), [shape.tokens] if padding else []])
        segments = Segments.from_offsets(torch.from_numpy(offsets.astype(np.int32)).to(run.device), shape.tokens)
        made += _problems(name, shape, run, segments)
    return made


def _problems(suffix: str, shape: Shape, run: Settings, segments: Segments) -> list[Problem]:
    ids, offsets, count = segments.ids, segments.offsets, segments.count
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32

    def fresh(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=run.device).to(dtype)

    heads = shape.heads, shape.width
    dim = shape.heads * shape.width
    by_byte, by_patch = (shape.tokens, *heads), (count, shape.vectors, *heads)
    return [
        Problem(
            name=f"bytes read patches{suffix}",
            segments=segments,
            leaves=(fresh(*by_byte), fresh(count, shape.vectors, 2, *heads)),
            upstream=fresh(*by_byte),
            kernels=lambda query, key_value: segment_operators.bytes_read(query, key_value, ids, offsets),
            steps=lambda query, key_value: bytes_read_patches_by_steps(query, key_value, segments),
        ),
        Problem(
            name=f"patches read bytes{suffix}",
            segments=segments,
            leaves=(fresh(*by_patch), fresh(shape.tokens, 2, *heads)),
            upstream=fresh(*by_patch),
            kernels=lambda query, key_value: segment_operators.patches_read(query, key_value, ids, offsets)[0],
            steps=lambda query, key_value: patches_read_bytes_by_steps(query, key_value, segments),
        ),
        Problem(
            name=f"maximum{suffix}",
            segments=segments,
            leaves=(fresh(shape.tokens, dim),),
            upstream=fresh(count, dim),
            kernels=lambda values: segment_operators.maximum(values, ids, offsets),
            steps=lambda values: segment_max_by_steps(values, segments),
        ),
        Problem(
            name=f"mean{suffix}",
            segments=segments,
            leaves=(fresh(shape.tokens, dim),),
            upstream=fresh(count, dim),
            kernels=lambda values: segment_operators.mean(values, ids, offsets),
            steps=lambda values: segment_mean_by_steps(values, segments),
        ),
    ]


def error(results: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest of results and gradients; nan never passes."""
    errors = [
        float((result.double() - wanted).norm() / wanted.norm())
        for result, wanted in zip(results, reference, strict=True)
    ]
    return max(errors, key=lambda value: float("inf") if value != value else value)


def ways(problem: Problem, run: Settings) -> dict[str, Callable[..., Tensor]]:
    """Those that run here and were asked for."""
    found: dict[str, Callable[..., Tensor]] = {}
    if run.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        found["kernels"] = problem.kernels
    found["steps"] = problem.steps
    if "compiled" in run.cases:
        found["compiled steps"] = torch.compile(problem.steps, dynamic=False)
    return found


def seconds_of(function: Callable[[], object], run: Settings, *, in_graph: bool) -> float:
    """Seconds of a call."""
    if in_graph:
        return graph_seconds(function, run.device)
    repeats, warmup = (7, 2) if run.device.type == "cuda" else (1, 0)
    return median_seconds(function, run.device, repeats=repeats, warmup=warmup)


def compare(problem: Problem, run: Settings) -> list[Row]:
    """Error and speed of every way."""
    reference = problem.results(problem.steps, torch.float64)
    rows: list[Row] = []
    for way, function in ways(problem, run).items():
        off = error(problem.results(function), reference)
        row: Row = {"what": problem.name, "way": way, "error": off, "ok": off < LIMITS[problem.upstream.dtype]}
        in_graph = way == "kernels" and run.device.type == "cuda"
        row["timed"] = "in a graph" if in_graph else "call by call"
        # New to autograd, which would otherwise draw the stream that they were made on into the graph's capture.
        leaves = [leaf.detach().clone().requires_grad_() for leaf in problem.leaves]

        def forward(of: Callable[..., Tensor] = function) -> Tensor:
            with torch.no_grad():
                return of(*problem.leaves)

        def both(of: Callable[..., Tensor] = function, inputs: list[Tensor] = leaves) -> Sequence[Tensor]:
            return torch.autograd.grad(of(*inputs), inputs, problem.upstream)

        seconds = seconds_of(forward, run, in_graph=in_graph)
        row |= {"forward ms": 1e3 * seconds, "forward GB/s": problem.forward_bytes / seconds / 1e9}
        seconds = seconds_of(both, run, in_graph=in_graph)
        total = problem.forward_bytes + problem.backward_bytes
        rows.append({**row, "both ms": 1e3 * seconds, "both GB/s": total / seconds / 1e9})
    return rows


def tune(problem: Problem, run: Settings) -> list[Row]:
    """The fastest cuts of every kernel of an attention; all are compiled before any is timed."""
    from blt_model import cross_kernels as kernels

    ids, offsets, upstream = problem.segments.ids, problem.segments.offsets, problem.upstream
    query, key_value = problem.leaves
    if problem.name.startswith("bytes"):
        calls: dict[str, Callable[[kernels.Cut], object]] = {
            "forward": lambda cut: kernels.bytes_read(query, key_value, ids, offsets, cut=cut),
            "backward": lambda cut: kernels.bytes_read_gradient(upstream, query, key_value, ids, offsets, cut=cut),
        }
    else:
        output, sums = kernels.patches_read(query, key_value, ids, offsets)
        calls = {
            "forward": lambda cut: kernels.patches_read(query, key_value, ids, offsets, cut=cut),
            "backward": lambda cut: kernels.patches_read_gradient(
                upstream, query, key_value, ids, offsets, output, sums, cut=cut
            ),
        }
    sizes = itertools.product((1, 2, 4, 8), ((1, 1), (2, 1), (4, 1), (4, 2), (8, 2), (16, 4)))
    cuts = [kernels.Cut(bytes=at_once, heads=heads, warps=warps) for at_once, (heads, warps) in sizes]
    jobs = [(kernel, cut) for kernel in calls for cut in cuts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: calls[job[0]](job[1]), jobs))
    rows: list[Row] = []
    for kernel, call in calls.items():
        timed: list[Row] = []
        for cut in cuts:
            if run.left > 0:
                seconds = graph_seconds(lambda of=call, by=cut: of(by), run.device)  # type: ignore[misc]  # bound now
                row: Row = {"what": problem.name, "kernel": kernel, "bytes": cut.bytes, "heads": cut.heads}
                timed.append({**row, "warps": cut.warps, "ms": 1e3 * seconds})
        rows += sorted(timed, key=lambda row: float(row["ms"]))[:TOP]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and time, or tune."""
    help_ = "Time ways to cut our kernels' work instead."
    run = settings(__doc__, arguments, budget=30, switches={"tune": help_})
    if "tune" in run.switches and run.device.type != "cuda":
        raise SystemExit("there is nothing to tune without a CUDA device")
    seed = int(os.environ.get("BLT_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"BLT_TEST_SEED={seed}")
    torch.manual_seed(seed)
    asked = [case for case in run.cases if case != "compiled"]
    rows: list[Row] = []
    for problem in problems(TINY if run.tiny else FULL, run, np.random.default_rng(seed)):
        if run.left <= 0 or (asked and not any(case in problem.name for case in asked)):
            continue
        if "tune" not in run.switches:
            rows += compare(problem, run)
        elif "read" in problem.name:
            rows += tune(problem, run)
    report("cross_attention", run, rows, seed=seed, copy_bandwidth=copy_bandwidth(run.device))
    if not all(row.get("ok", True) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
