"""Stacks of blocks for one token: all in one launch, against five kernels a block, from replayed graphs.

    python -m tools.bench.gpu.resident
    python -m tools.bench.gpu.resident --cases latent

- *latent*, *decoder*, *entropy*: the stacks of `blt-1b` (the decoder with its cross-attention) and `entropy-100m`,
  alone on the GPU; *beside*: entropy model and decoder at once, each on a part of the multiprocessors.
- *ours* is the resident stack, *reference* the kernels one after another, both with random weights in bfloat16.

Figures are microseconds a run, and the share of the bandwidth of a large copy at which weights were read. Errors are of
one form against the other. The last line is JSON. Exits with 1 if an error is beyond its limit. Needs compute
capability 9; elsewhere it measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tools.bench.gpu.harness import Row, Settings, copy_bandwidth, replayed_seconds, report, settings
from torch import Tensor

from blt_model import BLT, BLTConfig, ByteLM, ByteLMConfig, preset
from blt_model.caches import AttentionCache
from blt_model.generation import fused, resident
from blt_model.generation.graphs import Fork
from blt_model.generation.patch_steps import cross_steps
from blt_model.generation.resident import Parts, Programs, ResidentStack
from blt_model.generation.steps import BlockStep, CrossStep, block_steps

LIMIT = 2e-2
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
        patch = None
        if crosses:
            shape = (len(crosses), 1, config.num_heads, vectors, config.head_dim)
            numbers = torch.randn(2, *shape, device=cache.keys.device).to(cache.keys.dtype)
            patch = numbers[0], numbers[1]
        x = torch.randn(1, config.dim, device=cache.keys.device).to(cache.keys.dtype)
        stack = ResidentStack(Parts(blocks=blocks, caches=[cache], crosses=crosses, patch=patch))
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
    return made, Programs.of(run.device, model, lm)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases for which there is time."""
    run = settings(__doc__, arguments, budget=60)
    if not resident.available(run.device):
        report("resident", run, [], copy_bandwidth=None)
        return
    bandwidth = copy_bandwidth(run.device)
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.no_grad():
        stacks, programs = problems(run)
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
        at = torch.tensor([1_000], device=run.device)
        lm, decoder = stacks["entropy"], stacks["decoder"]

        def both(one: Callable[[], object], other: Callable[[], object]) -> None:
            fork = Fork(run.device)
            with fork.branch():
                one()
            other()
            fork.join()

        for own in (own for own in sorted({programs.entropy_model, *range(40, 81, 8)}) if run.wants(f"beside/{own}")):

            def together(own: int = own) -> None:
                both(lambda: lm.resident(at, own), lambda: decoder.resident(at, programs.all - own))

            def apart() -> None:
                both(lambda: lm.one_by_one(at), lambda: decoder.one_by_one(at))

            rows.append(figures(f"beside/{own}", together, apart, lm.bytes + decoder.bytes, run, bandwidth))
    report("resident", run, rows, copy_bandwidth=bandwidth, programs=programs.entropy_model)
    if not all(row["ok"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
