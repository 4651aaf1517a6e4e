"""Stacks of blocks for one token: all in one launch, against five kernels a block, from replayed graphs.

    python -m tools.bench.gpu.resident
    python -m tools.bench.gpu.resident --cases latent
    python -m tools.bench.gpu.resident --tune
    python -m tools.bench.gpu.resident --stamps

- *latent*, *decoder*, *entropy*: the stacks of `blt-1b` (the decoder with its cross-attention) and `entropy-100m`,
  alone on the GPU; *beside*: entropy model and decoder at once, each on a part of the multiprocessors.
- *ours* is the resident stack, *reference* the kernels one after another, both with random weights in bfloat16.

With `--tune` every manner of going about it is timed instead (see `blt_model.generation.resident.Manner`), compiled in
threads first: *beside* for the stacks of narrow rows, *latent* for wide ones, and ways to divide the multiprocessors.

With `--stamps` the programs note when they have ended each phase of a layer. Figures are medians, over all but the
first layer, of microseconds: what a program takes for the phase, how long of that its first warp waits for weights, and
how far apart programs end it.

Figures are microseconds a run, and the share of the bandwidth of a large copy at which weights were read. Errors are of
one form against the other. The last line is JSON. Exits with 1 if an error is beyond its limit. Needs compute
capability 9; elsewhere it measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from tools.bench.gpu.harness import REPLAYS, Row, Settings, copy_bandwidth, replayed_seconds, report, settings
from torch import Tensor

from blt_model import BLT, BLTConfig, ByteLM, ByteLMConfig, preset
from blt_model.caches import AttentionCache
from blt_model.generation import fused, resident
from blt_model.generation.graphs import Fork
from blt_model.generation.patch_steps import cross_steps
from blt_model.generation.resident import Parts, Programs, ResidentStack
from blt_model.generation.steps import BlockStep, CrossStep, block_steps

LIMIT = 2e-2
SWITCHES = {"tune": "Time all manners.", "stamps": "Say where a layer's time goes."}
POSITIONS = {"latent": (250, 2_000), "decoder": (1_000,), "entropy": (1_000,)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A stack in both forms."""

    blocks: list[BlockStep]
    cache: AttentionCache
    crosses: dict[int, CrossStep]
    patch: tuple[Tensor, Tensor] | None
    x: Tensor
    stack: ResidentStack

    @classmethod
    def of(cls, blocks: list[BlockStep], cache: AttentionCache, crosses: dict[int, CrossStep], vectors: int) -> Problem:
        """Fill the caches with random numbers."""
        config = cache.config
        cache.reserve(max(max(positions) for positions in POSITIONS.values()) + 1)
        for part in (cache.keys, cache.values):
            part.copy_(torch.randn_like(part, dtype=torch.float32))
        patch = absorbed = None
        if crosses:
            shape = (len(crosses), 1, config.num_heads, vectors, config.head_dim)
            numbers = torch.randn(2, *shape, device=cache.keys.device).to(cache.keys.dtype)
            patch = numbers[0], numbers[1]
            absorption = fused.Absorption(list(crosses.values()), vectors)
            absorption(numbers[:, :, 0].permute(3, 1, 0, 2, 4).contiguous())
            absorbed = absorption.patch
        x = torch.randn(1, config.dim, device=cache.keys.device).to(cache.keys.dtype)
        stack = ResidentStack(Parts(blocks=blocks, caches=[cache], crosses=crosses, patch=absorbed))
        return cls(blocks=blocks, cache=cache, crosses=crosses, patch=patch, x=x, stack=stack)

    @property
    def bytes(self) -> int:
        """Of the weights."""
        weights = [
            weight
            for block in self.blocks
            for weight in (block.query_key_value, block.output, block.gate_value, block.feed_forward_output)
        ]
        weights += [weight for cross in self.crosses.values() for weight in (cross.query, cross.output)]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def resident(self, at: Tensor, programs: int = 0) -> Tensor:
        """The one launch."""
        return self.stack(self.x, at, programs)

    def one_by_one(self, at: Tensor) -> Tensor:
        """Five kernels a block."""
        x, step, index = self.x, fused.FusedStep(at, None), 0
        for layer, block in enumerate(fused.block_steps(self.blocks)):
            if layer in self.crosses and self.patch is not None:
                x = fused.read_patches(self.crosses[layer], x, self.patch[0][index], self.patch[1][index])
                index += 1
            x = block(x, self.cache, layer, step)
        return x


def problems(run: Settings) -> tuple[dict[str, Problem], Programs]:
    """Both presets' stacks with random weights."""
    config, lm_config = preset("blt-1b"), preset("entropy-100m")
    if not isinstance(config, BLTConfig) or not isinstance(lm_config, ByteLMConfig):
        raise TypeError("the presets are not a blt and a byte-lm")
    with torch.device(run.device):
        model, lm = BLT(config).to(torch.bfloat16), ByteLM(lm_config).to(torch.bfloat16)
    layers = [int(layer) for layer in model.decoder.cross_attention]
    crosses = dict(zip(layers, cross_steps(model.decoder.cross_attention), strict=True))
    stacks = {
        "latent": (model.latent.blocks, config.latent, {}),
        "decoder": (model.decoder.blocks, config.decoder, crosses),
        "entropy": (lm.blocks, lm_config.transformer, {}),
    }
    made = {}
    for name, (blocks, shape, read) in stacks.items():
        cache = AttentionCache(shape, 1, dtype=torch.bfloat16, device=run.device)
        made[name] = Problem.of(block_steps(blocks), cache, read, config.cross_attention.k)
    return made, Programs.of(run.device, has_entropy_model=True)


def figures(
    name: str, ours: Callable[[], object], reference: Callable[[], object], size: int, run: Settings, bandwidth: float
) -> Row:
    """Of both forms."""
    times = replayed_seconds(ours, run.device), replayed_seconds(reference, run.device)
    return {
        "case": name,
        "ours_us": 1e6 * times[0],
        "reference_us": 1e6 * times[1],
        "ratio": times[1] / times[0],
        "of_copy": size / times[0] / bandwidth,
        "ok": True,
    }


def positions(stacks: dict[str, Problem], run: Settings) -> dict[str, Tensor]:
    """The first of every stack."""
    return {name: torch.tensor([POSITIONS[name][0]], device=run.device) for name in stacks}


def beside(stacks: dict[str, Problem], run: Settings, at: dict[str, Tensor], programs: tuple[int, int]) -> None:
    """Entropy model and decoder at once, on so many multiprocessors."""
    fork = Fork(run.device)
    with fork.branch():
        stacks["entropy"].resident(at["entropy"], programs[0])
    stacks["decoder"].resident(at["decoder"], programs[1])
    fork.join()


def stamps(stacks: dict[str, Problem], run: Settings, programs: Programs) -> list[Row]:
    """Where the time of a layer goes, of each stack alone and of two beside one another."""
    at, rows = positions(stacks, run), []
    for name, problem in stacks.items():
        problem.stack.take(replace(problem.stack.manner, stamps=True))
        for _ in range(REPLAYS):
            problem.resident(at[name])
        rows += phases(name, problem.stack, programs.all)
    for _ in range(REPLAYS):
        beside(stacks, run, at, (programs.entropy_model, programs.model))
    rows += phases("entropy beside", stacks["entropy"].stack, programs.entropy_model)
    rows += phases("decoder beside", stacks["decoder"].stack, programs.model)
    return rows


def tune(stacks: dict[str, Problem], run: Settings, bandwidth: float, programs: Programs) -> list[Row]:
    """Times of all manners, the quickest first."""
    ways = [
        resident.Manner(slot=slot, in_flight=in_flight)
        for slot in (24_576, 36_864, 49_152)
        for in_flight in (0, 1, 2, 3)
    ]
    at = positions(stacks, run)

    def take(manner: resident.Manner) -> None:
        for problem in stacks.values():
            problem.stack.take(manner)

    jobs = [(problem, manner) for problem in stacks.values() for manner in ways]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: job[0].stack.compiled(job[1]), jobs))

    rows: list[Row] = []

    def measure(case: str, manner: resident.Manner, size: int, function: Callable[[], object]) -> None:
        take(manner)
        seconds = replayed_seconds(function, run.device)
        rows.append(
            {"case": case, **asdict(manner), "us": 1e6 * seconds, "of_copy": size / seconds / bandwidth, "ok": True}
        )

    def best(case: str) -> resident.Manner:
        rows.sort(key=lambda row: (row["case"], row["us"]))
        first = next(row for row in rows if row["case"] == case)
        return resident.Manner(**{name: first[name] for name in ("slot", "in_flight")})

    size = stacks["entropy"].bytes + stacks["decoder"].bytes
    for manner in ways:
        measure("latent", manner, stacks["latent"].bytes, lambda: stacks["latent"].resident(at["latent"]))
        usual = programs.entropy_model, programs.model
        measure("beside", manner, size, partial(beside, stacks, run, at, usual))
    for own in range(44, 69, 4):
        measure(
            f"beside/{own} of the best",
            best("beside"),
            size,
            partial(beside, stacks, run, at, (own, programs.model)),
        )
    best("latent")
    return rows


def phases(case: str, stack: ResidentStack, programs: int) -> list[Row]:
    """What the stamps of a stack's last launch say."""
    kept = stack.stamps(programs).astype(np.float64)
    kept = kept[:, kept[-1, :, 0, 0] > 0]
    names = [name for name, stamp in zip(resident.PHASES, stack.stamps(1)[-1, :, 0, 0], strict=True) if stamp > 0]
    layers, count = kept.shape[:2]
    ends, cycles, waited = (kept[..., index].reshape(layers * count, programs) for index in range(3))
    scale = (ends[-1] - ends[0]).mean() / (cycles[-1] - cycles[0]).mean() / 1e3
    rows: list[Row] = []
    for phase, name in enumerate(names):
        at = np.arange(count + phase, layers * count, count)
        rows.append(
            {
                "case": case,
                "phase": name,
                "us": float(np.median(cycles[at] - cycles[at - 1])) * scale,
                "waits_us": float(np.median((waited[at] - waited[at - 1]).mean(axis=1))) * scale,
                "apart_us": float(np.median(np.ptp(ends[at], axis=1))) / 1e3,
                "handed_us": float(np.median(ends[at].min(axis=1) - ends[at - 1].max(axis=1))) / 1e3,
                "ok": True,
            }
        )
    a_layer = float((ends[-1].max() - ends[count - 1].max()) / (layers - 1)) / 1e3
    return [*rows, {"case": case, "phase": "a layer", "us": a_layer, "ghz": 1e-3 / scale, "ok": True}]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases for which there is time."""
    run = settings(__doc__, arguments, budget=60, switches=SWITCHES)
    if not resident.available(run.device):
        report("resident", run, [], copy_bandwidth=None)
        return
    bandwidth = copy_bandwidth(run.device)
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.no_grad():
        stacks, programs = problems(run)
        if "tune" in run.switches:
            report("resident_tune", run, tune(stacks, run, bandwidth, programs), copy_bandwidth=bandwidth)
            return
        if "stamps" in run.switches:
            report("resident_stamps", run, stamps(stacks, run, programs), copy_bandwidth=bandwidth)
            return
        for name, problem in stacks.items():
            for position in POSITIONS[name]:
                case = f"{name}/{position}"
                if not run.wants(case):
                    continue
                at = torch.tensor([position], device=run.device)
                ours, reference = partial(problem.resident, at), partial(problem.one_by_one, at)
                found, wanted = ours().double(), reference().double()
                row = figures(case, ours, reference, problem.bytes, run, bandwidth)
                row["error"] = float((found - wanted).norm() / wanted.norm())
                row["ok"] = row["error"] < LIMIT
                rows.append(row)
        at_first = positions(stacks, run)
        lm, decoder = stacks["entropy"], stacks["decoder"]

        def apart() -> None:
            fork = Fork(run.device)
            with fork.branch():
                lm.one_by_one(at_first["entropy"])
            decoder.one_by_one(at_first["decoder"])
            fork.join()

        for own in (own for own in sorted({programs.entropy_model, *range(44, 69, 4)}) if run.wants(f"beside/{own}")):
            together = partial(beside, stacks, run, at_first, (own, programs.model))
            rows.append(figures(f"beside/{own}", together, apart, lm.bytes + decoder.bytes, run, bandwidth))
    report("resident", run, rows, copy_bandwidth=bandwidth, programs=programs.entropy_model)
    if not all(row["ok"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
