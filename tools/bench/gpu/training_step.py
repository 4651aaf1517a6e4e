"""A training step on the GPU: bytes a second, share of the peak, memory, and where the time goes.

    python -m tools.bench.gpu.training_step
    python -m tools.bench.gpu.training_step --cases blt-1b/8192 --budget 120

Forward, loss and backward of micro batches of real document lengths (cut at the sequence length), weights in float32,
products in bfloat16, as the trainer runs them: every block compiled by itself. Four micro batches are timed in a row,
for the trainer waits for the GPU once a global batch, which has many; `alone_ms` is one, waited for before and after.
The optimizer's update is timed apart. Operations are exact and those of the model alone: no entropy model, no
recomputation. `mfu` is the share of the datasheet's dense bfloat16 rate, `of_matmul` that of a large matrix product on
the same device. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tools.bench.gpu.harness import (
    Row,
    Settings,
    copy_bandwidth,
    matmul_rate,
    median_seconds,
    peak_rate,
    report,
    settings,
    wait,
)
from tools.bench.gpu.profiles import time_by_kind
from tools.bench.gpu.texts import patch_lengths, pieces
from torch import Tensor

from blt_model import BLT, BLTConfig, PackedBatch, pack_documents, preset
from blt_model.loss import cross_entropy_sum
from blt_train.config import ActivationCheckpointing, OptimizerConfig
from blt_train.errors import ConfigError
from blt_train.model_flops import training_flops
from blt_train.optim import make_optimizer
from blt_train.parallel import float8
from blt_train.parallel.accumulation import accumulate_in_place, begin_accumulation
from blt_train.parallel.compilation import compile_blocks
from blt_train.parallel.gradients import clip_whole
from blt_train.parallel.recomputation import recompute_blocks

PATCH_LENGTH = 4.5
MICRO_BATCHES = 4
"""In a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One configuration."""

    preset: str
    sequence: int
    """Tokens of a sequence, at which documents are cut."""
    tokens: int
    """Tokens of a micro batch."""
    backend: str = "auto"
    compiled: str = "blocks"
    """What is compiled as one: "blocks", as the trainer does, "model" or "nothing"."""
    checkpointing: str = "none"
    float8: bool = False
    table_size: int | None = None
    """Rows of a hash table; None for the preset's."""

    @property
    def name(self) -> str:
        """What --cases selects by."""
        parts = [self.preset, str(self.sequence), f"t{self.tokens}", self.backend, self.checkpointing]
        parts += [f"compile-{self.compiled}"] + ["float8"] * self.float8
        parts += [] if self.table_size is None else [f"h{self.table_size}"]
        return "/".join(parts)


CASES = (
    Case(preset="blt-1b", sequence=8192, tokens=32768),
    Case(preset="blt-1b", sequence=8192, tokens=65536, checkpointing="selective"),
    Case(preset="blt-400m", sequence=8192, tokens=65536),
    Case(preset="blt-1b", sequence=16384, tokens=32768),
    Case(preset="blt-400m", sequence=16384, tokens=65536),
    Case(preset="blt-400m", sequence=8192, tokens=32768, compiled="nothing"),
    Case(preset="blt-400m", sequence=8192, tokens=32768, backend="sdpa", compiled="nothing"),
    Case(preset="blt-400m", sequence=8192, tokens=32768, backend="flex", compiled="nothing"),
    Case(preset="blt-1b", sequence=8192, tokens=32768, float8=True),
    Case(preset="blt-1b", sequence=8192, tokens=32768, compiled="model"),
)
"""Backend "flex" where nothing else is compiled: inside a compiled model its kernel took over a minute to compile."""
TINY = (
    Case(preset="blt-debug", sequence=64, tokens=256, compiled="nothing"),
    Case(preset="blt-debug", sequence=128, tokens=256, compiled="nothing", backend="sdpa", checkpointing="full"),
)


@dataclass(frozen=True, slots=True)
class Work:
    """A micro batch on the device and its operations, forward and backward."""

    batch: PackedBatch
    targets: Tensor
    flops: float
    bytes: int
    patches: int


def make_work(case: Case, config: BLTConfig, device: torch.device) -> Work:
    """A micro batch of real document lengths and random patches, full, as the trainer's are.

    Some patches are merged, so that their number is one that float8 takes.
    """
    rng = np.random.default_rng(0)
    texts = [text.astype(np.int64) for text in pieces(case.tokens, case.sequence)]
    lengths = [patch_lengths(len(text), PATCH_LENGTH, rng) for text in texts]
    batch, targets = pack_documents(texts, lengths)
    if spare := num_patches(batch) % float8.MULTIPLE:
        longest_row = max(range(len(lengths)), key=lambda index: len(lengths[index]))
        first, merged, rest = np.split(lengths[longest_row], [1, 1 + 2 * spare])
        lengths[longest_row] = np.concatenate([first, merged.reshape(-1, 2).sum(1), rest])
        batch, targets = pack_documents(texts, lengths)
    inputs = np.array([len(text) - 1 for text in texts])
    patches = np.array([len(row) for row in lengths])
    # The trainer bounds both by the sequence, so that shapes and kernels do not depend on the batch.
    longest = int(1.06 * case.sequence / PATCH_LENGTH)
    batch = dataclasses.replace(batch, max_document_tokens=case.sequence, max_document_patches=longest)
    return Work(
        batch.to(device),
        targets.to(device),
        training_flops(config, inputs, patches),
        int((targets >= 4).sum()),
        num_patches(batch),
    )


def num_patches(batch: PackedBatch) -> int:
    """Patches of a batch."""
    if batch.patch_offsets is None:
        raise RuntimeError("the batch has no patches")
    return len(batch.patch_offsets) - 1


def make_model(case: Case, device: torch.device) -> tuple[BLT, BLTConfig]:
    """Fresh weights on the device, prepared as the trainer prepares a model for one GPU."""
    overrides: dict[str, Any] = {}
    if case.table_size is not None:
        overrides["hash_embedding"] = {"table_size": case.table_size}
    config = preset(case.preset, **overrides)
    if not isinstance(config, BLTConfig):
        raise TypeError(f"{case.preset} is no blt")
    torch.manual_seed(0)
    with torch.device(device):
        model = BLT(config, attention_backend=case.backend)
    # In the order of blt_train.parallel.building.
    if case.float8:
        float8.use_float8(model)
    recompute_blocks(model, ActivationCheckpointing(case.checkpointing))
    if case.compiled == "blocks":
        compile_blocks(model)
    elif case.compiled == "model":
        model.compile(dynamic=False)
    accumulate_in_place(model, maps=device.type == "cuda")
    begin_accumulation(model)
    return model, config


def step_of(model: BLT, work: Work, device: torch.device) -> Callable[[], None]:
    """Forward, loss and backward of one micro batch; gradients add up, as over the micro batches of a step."""
    half = device.type == "cuda"
    scale = 1 / int((work.targets >= 0).sum())

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(work.batch)
        (cross_entropy_sum(logits, work.targets) * scale).backward()  # type: ignore[no-untyped-call]

    return run


def measure(case: Case, run: Settings, ceiling: float, peak: float | None) -> Row:
    """All figures of one configuration."""
    device = run.device
    model, config = make_model(case, device)
    work = make_work(case, config, device)
    step = step_of(model, work, device)
    step()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = median_seconds(step, device, repeats=2 if run.tiny else 5, warmup=2)

    def steps() -> None:
        for _ in range(MICRO_BATCHES):
            step()

    seconds = median_seconds(steps, device, repeats=1 if run.tiny else 3) / MICRO_BATCHES
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    kinds = time_by_kind(step, device, top=24)
    optimizer_seconds = None
    # Twice the weights in float32 for the moments, beside weights and gradients.
    needed = 8 * sum(parameter.numel() for parameter in model.parameters())
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > needed + (4 << 30):
        optimizer = make_optimizer(model, OptimizerConfig())
        optimizer_seconds = median_seconds(lambda: update(model, optimizer), device, repeats=3)
    rate = work.flops / seconds
    return {
        "case": case.name,
        "bytes/s": work.bytes / seconds,
        "patches/s": work.patches / seconds,
        "ms": 1e3 * seconds,
        "alone_ms": 1e3 * alone,
        "TFLOP/s": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
        "of_matmul": rate / ceiling,
        "GB": memory,
        "optimizer_ms": None if optimizer_seconds is None else 1e3 * optimizer_seconds,
        "flops_per_byte": work.flops / work.bytes,
        "ms_by_kind": kinds,
    }


def update(model: BLT, optimizer: torch.optim.Optimizer) -> None:
    """Clip and update, gradients kept for the next repeat and within their limit, as they are in most steps."""
    clip_whole(model.parameters(), math.inf)
    optimizer.step()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases for which there is time."""
    run = settings(__doc__, arguments, budget=150)
    ceiling, bandwidth, peak = matmul_rate(run.device), copy_bandwidth(run.device), peak_rate(run.device)
    rows: list[Row] = []
    for case in TINY if run.tiny else CASES:
        if not run.wants(case.name):
            continue
        try:
            rows.append(measure(case, run, ceiling, peak))
        except torch.OutOfMemoryError:
            rows.append({"case": case.name, "bytes/s": None, "note": "out of memory"})
        except ConfigError as error:
            rows.append({"case": case.name, "bytes/s": None, "note": str(error)})
        # At once: a run that is cut short has shown what it found.
        print(rows[-1], flush=True)
        torch._dynamo.reset()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    for row in rows:
        print(row["case"], {kind: round(value, 1) for kind, value in row.get("ms_by_kind", {}).items()})
    report("training_step", run, rows, matmul_flops=ceiling, copy_bandwidth=bandwidth, peak_flops=peak)


if __name__ == "__main__":
    main()
