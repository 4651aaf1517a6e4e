"""The memory that a training step takes at its highest, beside what `blt-train plan` reckons for it.

    python -m tools.bench.gpu.peak_memory
    python -m tools.bench.gpu.peak_memory --cases blt-400m

Real steps of one micro batch, eager, in bfloat16, with AdamW, of whole sequences in patches of the planned length; `GB`
is torch's own count, without the CUDA context. A test of the plan takes its measured peaks from here. The last line is
JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tools.bench.gpu.harness import Row, Settings, report, settings, wait
from torch import Tensor

from blt_model import PackedBatch, cross_entropy_and_z_sum, pack_documents
from blt_train import TrainConfig, load_config
from blt_train.inputs import architecture_of_config
from blt_train.optim import make_optimizer
from blt_train.parallel.building import new_model
from blt_train.planning.planner import memory_bytes, micro_batch

STEPS = 2
"""The optimizer's state is there from the second on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A config and the size of its micro batch."""

    config: str
    sequence: int
    sequences: int
    mode: str = "none"

    @property
    def name(self) -> str:
        """What --cases selects by."""
        return f"{self.config}/{self.sequence}x{self.sequences}/{self.mode}"

    def load(self) -> TrainConfig:
        """The config, of one micro batch a step."""
        values = {
            "data.sequence_tokens": self.sequence,
            "batch.sequences_per_step": self.sequences,
            "batch.sequences_per_micro_batch": self.sequences,
            "parallel.activation_checkpointing": self.mode,
            "precision": "bfloat16",
            "compile": "false",
            "logging.update_norm": "false",
        }
        return load_config(self.config, [f"{key}={value}" for key, value in values.items()])


CASES = (
    Case(config="entropy-100m", sequence=4096, sequences=16),
    Case(config="blt-400m", sequence=8192, sequences=8),
    Case(config="blt-400m", sequence=8192, sequences=8, mode="selective"),
    Case(config="blt-400m", sequence=8192, sequences=8, mode="full"),
)
TINY = (
    Case(config="debug-entropy", sequence=64, sequences=2),
    Case(config="debug-blt", sequence=64, sequences=2, mode="selective"),
)


def make_batch(config: TrainConfig) -> tuple[PackedBatch, Tensor]:
    """A full micro batch of sequences of one document each."""
    sizes = micro_batch(config, architecture_of_config(config))
    length = config.data.sequence_tokens
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, 260, length + 1) for _ in range(sizes.tokens // length)]
    if not sizes.patches:
        return pack_documents(documents)
    count = round(length / config.plan.patch_length)
    ends = np.linspace(1, length + 1, count + 1).round().astype(np.int64)
    lengths = np.concatenate([[1], np.diff(ends)])
    return pack_documents(documents, [lengths] * len(documents), num_patches=sizes.patches)


def measure(case: Case, run: Settings) -> Row:
    """Take steps, and read the counter."""
    config, device = case.load(), run.device
    model = new_model(architecture_of_config(config), config, device, None)
    optimizer = make_optimizer(model, config.optimizer)
    batch, targets = make_batch(config)
    batch, targets = batch.to(device), targets.to(device)
    for _ in range(STEPS):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch)
        loss = cross_entropy_and_z_sum(logits, targets, 0.0)[0] / len(targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        wait(device)
    reckoned = memory_bytes(config) / 1e9
    row: Row = {"case": case.name, "loss": float(loss.detach()), "reckoned GB": reckoned}
    if device.type != "cuda":
        return row
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    return {**row, "GB": peak, "reckoned / measured": reckoned / peak}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases for which there is time."""
    run = settings(__doc__, arguments, budget=60)
    rows = []
    for case in TINY if run.tiny else CASES:
        if run.wants(case.name):
            rows.append(measure(case, run))
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
    report("peak_memory", run, rows)


if __name__ == "__main__":
    main()
