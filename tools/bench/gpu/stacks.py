"""One token of one row through a whole stack in one launch, beside the same in a launch or five for every block's part.

    python -m tools.bench.gpu.stacks
    python -m tools.bench.gpu.stacks --tune --cases latent,entropy

Stacks as in `blt-1b` and `entropy-100m`, random weights in bfloat16, windows full, from replayed graphs. `decoder` has
a folded cross-attention before every block. `both` runs the entropy model's stack beside the decoder's. `same weights`
gives all blocks the weights of one, which stay in the level 2 cache: what is left is not reading. --tune times other
ways to share the work out. Errors are of the result against the kernels for every part; `same` says whether 200
launches gave the same bits. On the CPU it runs under TRITON_INTERPRET=1 only. The last line is JSON. Exits with 1 if an
error is beyond its limit.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from tools.bench.gpu.harness import Row, Settings, copy_bandwidth, report, settings, wait
from tools.bench.gpu.matvec import compiled, half_dtype, has_kernels, relative, seconds_of
from torch import Tensor

from blt_model.caches import AttentionCache
from blt_model.config import TransformerConfig
from blt_model.generation import fused
from blt_model.generation.graphs import beside
from blt_model.generation.stack_plans import Tuning
from blt_model.generation.steps import BlockStep, Norm

if TYPE_CHECKING:
    from blt_model.generation.stacks import FoldedMaps, Stack

LIMIT = 2e-2
EPS = 1e-5
REPEATS = 200
PATIENCE = 60.0
"""Seconds without a result after which programs are taken to wait for each other for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A stack and how far it is."""

    name: str
    config: TransformerConfig
    context: int
    pairs: int = 0


LOCAL = {"dim": 1024, "num_heads": 16, "window": 512}
CASES = (
    Case(name="entropy", config=TransformerConfig(dim=768, num_layers=14, num_heads=12, window=512), context=1000),
    Case(name="decoder", config=TransformerConfig(num_layers=9, **LOCAL), context=1000, pairs=32),
    Case(name="encoder", config=TransformerConfig(num_layers=1, **LOCAL), context=1000),
    Case(name="latent/250", config=TransformerConfig(dim=2048, num_layers=25, num_heads=16), context=250),
    Case(name="latent/2000", config=TransformerConfig(dim=2048, num_layers=25, num_heads=16), context=2000),
)
TINY_CASES = (
    Case(name="entropy", config=TransformerConfig(dim=96, num_layers=2, num_heads=6, window=8), context=12),
    Case(name="decoder", config=TransformerConfig(dim=64, num_layers=2, num_heads=4, window=8), context=12, pairs=8),
)
TINY = Tuning(programs=1, splits=2, block=4, window=2, most_chunks=2)
"""The interpreter runs programs after one another, so there can be only one."""


class Problem:
    """A case with random numbers."""

    def __init__(self, case: Case, run: Settings, *, same: bool = False) -> None:
        """Fresh numbers; the same weights for all blocks if asked for."""
        config, device, half = case.config, run.device, half_dtype(run)
        dim, hidden = config.dim, config.feed_forward_dim
        self.case = case

        def made(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).div(shape[-1] ** 0.5).to(half)

        def norm() -> Norm:
            return Norm(torch.rand(dim, device=device).add(0.5).to(half), EPS)

        def block() -> BlockStep:
            maps = made(3 * dim, dim), made(dim, dim), made(2 * hidden, dim), made(dim, hidden)
            heads = config.num_heads, config.kv_heads, config.head_dim
            return BlockStep(norm(), maps[0], maps[1], norm(), maps[2], maps[3], *heads)

        self.blocks = [block()] * config.num_layers if same else [block() for _ in range(config.num_layers)]
        self.caches = [AttentionCache(config, 1, dtype=half, device=device, capacity=2048) for _ in range(2)]
        for cache in self.caches:
            cache.reserve(case.context + 1)
        for buffer in ("keys", "values"):
            filled = torch.randn_like(getattr(self.caches[0], buffer))
            for cache in self.caches:
                getattr(cache, buffer).copy_(filled)
        self.x = torch.randn(1, dim, device=device).to(half)
        self.positions = torch.tensor([case.context], device=device)
        self.score_map = made(config.num_layers, 1, max(case.pairs, 1), dim)
        self.output_map = made(config.num_layers, 1, dim, max(case.pairs, 1))

    @property
    def bytes_read(self) -> int:
        """Bytes of weights, keys and values."""
        config = self.case.config
        weights = sum(
            matrix.numel() * matrix.element_size()
            for block in self.blocks
            for matrix in (block.query_key_value, block.output, block.gate_value, block.feed_forward_output)
        )
        held = min(self.case.context + 1, config.window or self.case.context + 1)
        return weights + 4 * config.num_layers * held * config.dim

    def maps(self) -> FoldedMaps | None:
        """The folded cross-attentions, if the case has them."""
        from blt_model.generation.stacks import FoldedMaps

        if not self.case.pairs:
            return None
        return FoldedMaps(score_map=self.score_map, output_map=self.output_map, vectors=2, residual=2.0)

    def stack(self, tuning: Tuning | None) -> Stack:
        """In one launch."""
        from blt_model.generation.stacks import Stack

        return Stack(self.blocks, self.caches[1], maps=self.maps(), tuning=tuning)

    def chain(self) -> Tensor:
        """In a launch for every part."""
        from blt_model.generation.folding_kernels import read_folded

        x, step = self.x, fused.FusedStep(self.positions, None)
        for layer, block in enumerate(self.blocks):
            if self.case.pairs:
                maps = self.score_map[layer], self.output_map[layer]
                x = read_folded(x, *maps, self.case.pairs // 2, residual=2.0, eps=EPS)
            x = fused.FusedBlock(block)(x, self.caches[0], layer, step)
        return x


def candidates(case: Case, usual: Tuning) -> dict[str, Tuning]:
    """Ways to share the work out, by name."""
    changes: list[dict[str, object]] = [{"window": count} for count in (2, 3, 4, 6, 8)]
    changes += [{"ahead": count} for count in (0, 2, 4, 12, 20)]
    changes += [{"splits": 8}, {"splits": 8, "block": 32}, {"cooperative": False}, {"programs": 132}]
    if case.name.startswith("latent"):
        changes += [{"warps": 16, "window": 2}, {"warps": 16, "window": 3}, {"warps": 4}]
    else:
        changes += [{"warps": 8, "window": 2}, {"warps": 8, "window": 3}, {"warps": 8, "window": 2, "registers": 128}]
    found = {", ".join(f"{name} {value}" for name, value in change.items()): change for change in changes}
    named = {name: replace(usual, **change) for name, change in found.items()}  # type: ignore[arg-type]  # of the fields' types
    return {name: tuning for name, tuning in named.items() if tuning != usual}


@contextmanager
def impatience() -> Iterator[Callable[[str], None]]:
    """End the process if nothing is reported for long; yields what to report to."""
    latest = {"the beginning": time.monotonic()}

    def tell(what: str) -> None:
        latest[what] = time.monotonic()

    def watch() -> None:
        while latest:
            time.sleep(1.0)
            if latest and time.monotonic() - max(latest.values()) > PATIENCE:
                print(f"nothing for {PATIENCE:.0f} seconds after {list(latest)[-1]}", file=sys.stderr, flush=True)
                os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield tell
    finally:
        latest.clear()


def figures(problem: Problem, way: str, seconds: float, bandwidth: float) -> Row:
    """A row of the report."""
    size = problem.bytes_read
    return {"case": problem.case.name, "way": way, "us": 1e6 * seconds, "of_copy": size / seconds / bandwidth}


def stack_row(problem: Problem, way: str, stack: Stack, wanted: Tensor, run: Settings, bandwidth: float) -> Row:
    """Figures of a stack in one launch."""
    found = stack(problem.x, problem.positions)
    error = relative(found, wanted.double())
    cached = relative(problem.caches[1].keys, problem.caches[0].keys.double())
    again = [stack(problem.x, problem.positions) for _ in range(3 if run.tiny else REPEATS)]
    same = all(bool(torch.equal(found, one)) for one in again)
    row = figures(problem, way, seconds_of(lambda: stack(problem.x, problem.positions), run), bandwidth)
    return {**row, "error": error, "same": same, "ok": max(error, cached) < LIMIT and same}


def case_rows(case: Case, run: Settings, bandwidth: float, tell: Callable[[str], None]) -> list[Row]:
    """Figures of a case in all ways."""
    problem = Problem(case, run)
    usual = TINY if run.tiny else problem.stack(None).tuning
    ways = {"one launch": usual}
    if "tune" in run.switches:
        ways |= candidates(case, usual)
    stacks = {name: problem.stack(tuning) for name, tuning in ways.items()}
    wanted = problem.chain()
    failures = compiled([lambda s=stack: s(problem.x, problem.positions) for stack in stacks.values()], run)  # type: ignore[misc]  # mypy knows no type of s
    wait(run.device)
    tell(f"compiling {case.name}")
    rows = [{**figures(problem, "launch by launch", seconds_of(problem.chain, run), bandwidth), "ok": True}]
    for (name, stack), failure in zip(stacks.items(), failures, strict=True):
        if failure:
            rows.append({"case": case.name, "way": name, "ok": False, "failure": failure})
            continue
        rows.append(stack_row(problem, name, stack, wanted, run, bandwidth))
        tell(f"{case.name}, {name}")
        print(rows[-1], flush=True)
    if not run.tiny:
        held = Problem(case, run, same=True)
        row = stack_row(held, "one launch, same weights", held.stack(usual), held.chain(), run, bandwidth)
        rows.append({**row, "of_copy": None})
    return rows


def both_rows(cases: Sequence[Case], run: Settings, bandwidth: float) -> list[Row]:
    """Figures of two stacks beside each other."""
    problems = [Problem(case, run) for case in cases]
    stacks = [problem.stack(TINY if run.tiny else None) for problem in problems]
    outs = [torch.zeros_like(problem.x) for problem in problems]
    wanted = [problem.chain() for problem in problems]

    def pair() -> None:
        with beside(run.device) as join:
            outs[0].copy_(stacks[0](problems[0].x, problems[0].positions))
        outs[1].copy_(stacks[1](problems[1].x, problems[1].positions))
        join()

    def chains() -> None:
        with beside(run.device) as join:
            problems[0].chain()
        problems[1].chain()
        join()

    rows: list[Row] = []
    for way, call in (("launch by launch", chains), ("one launch", pair)):
        seconds = seconds_of(call, run)
        size = sum(problem.bytes_read for problem in problems)
        rows.append(
            {"case": "both", "way": way, "us": 1e6 * seconds, "of_copy": size / seconds / bandwidth, "ok": True}
        )
    error = max(relative(out, one.double()) for out, one in zip(outs, wanted, strict=True))
    rows[-1] |= {"error": error, "ok": error < LIMIT}
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases for which there is time."""
    switches = {"tune": "Time other ways to share the work out too."}
    run = settings(__doc__, arguments, budget=60, switches=switches)
    if not has_kernels(run):
        report("stacks", run, [{"case": "none", "note": "needs CUDA, or TRITON_INTERPRET=1", "ok": True}])
        return
    bandwidth = copy_bandwidth(run.device)
    torch.manual_seed(0)
    cases = TINY_CASES if run.tiny else CASES
    rows: list[Row] = []
    with torch.no_grad(), impatience() as tell:
        for case in cases:
            if run.wants(case.name):
                rows += case_rows(case, run, bandwidth, tell)
        if run.wants("both"):
            rows += both_rows(cases[:2], run, bandwidth)
    report("stacks", run, rows, copy_bandwidth=bandwidth)
    if not all(row["ok"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
