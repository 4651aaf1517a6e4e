"""Forward and forward + backward of our BLT against transformers' BltForCausalLM: speed, and memory at its highest.

Run from the repository's root, on an otherwise idle machine:

    uv run python -m tools.bench.forward

Same weights, same text, same patches, in the shapes 4 documents of 1,024 bytes and 1 of 8,192. In speed both sides take
turns in one process, and the figure is the median. Memory is measured in a process for each side: the highest resident
size during a pass less that before it. The last line is JSON: the worst ratio of speeds, and every figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.blt_model.transformers_map import blt_weights, their_blt
from tools.bench.train_step import bench_config, padded, sample_rows

from blt_model import BLT, pack_documents

SHAPES = {"4 x 1,024": [1024] * 4, "1 x 8,192": [8192]}
SIDES = ("ours", "transformers")
MODES = ("forward", "forward + backward")


def models() -> tuple[BLT, Any]:
    """Ours and theirs with the same weights."""
    torch.manual_seed(0)
    config = bench_config()
    theirs = their_blt(config, attention="sdpa")
    ours = BLT(config)
    ours.load_state_dict(blt_weights(theirs.state_dict(), config))
    return ours, theirs


def passes(ours: BLT, theirs: Any, lengths: list[int]) -> dict[str, Callable[[], torch.Tensor]]:
    """Each side's forward pass to logits of all tokens."""
    documents, patches = sample_rows(lengths)
    batch, _ = pack_documents(documents, patches)
    inputs, table, _ = padded(documents, patches)
    return {
        "ours": lambda: ours(batch),
        "transformers": lambda: theirs(inputs, patch_lengths=table, use_cache=False).logits.flatten(0, 1),
    }


def run(logits: Callable[[], torch.Tensor], mode: str) -> torch.Tensor:
    """One pass; returns the logits without history."""
    with torch.set_grad_enabled(mode != "forward"):
        result = logits()
        if mode != "forward":
            # The mean's gradient reaches every weight, as a loss's does; the cost of a loss is not measured.
            torch.autograd.backward(result.square().mean())
    return result.detach()


def peak_megabytes(lengths: list[int], side: str, mode: str) -> float:
    """Growth of the resident size at its highest during one pass, in this process; Linux tells and resets it."""
    ours, theirs = models()
    run(passes(ours, theirs, [64])[side], mode)  # loads what torch loads, and makes the gradients
    logits = passes(ours, theirs, lengths)[side]
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kilobytes("VmRSS")
    run(logits, mode)
    return (status_kilobytes("VmHWM") - before) / 1024


def status_kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(shape: str, mode: str, options: argparse.Namespace) -> dict[str, float | str]:
    lengths = SHAPES[shape]
    sides = passes(*models(), lengths)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    results = {}
    for repeat in range(options.repeats + 1):
        for side in SIDES:
            started = time.perf_counter()
            results[side] = run(sides[side], mode)
            if repeat:  # the first is warm-up
                seconds[side].append(time.perf_counter() - started)
    gap = float((results["ours"] - results["transformers"]).abs().max() / results["transformers"].abs().max())
    figures: dict[str, float | str] = {"shape": shape, "mode": mode, "largest_difference": gap}
    for side in SIDES:
        figures[f"{side}_bytes_per_s"] = round(sum(lengths) / statistics.median(seconds[side]))
        command = [sys.executable, "-m", "tools.bench.forward", "--memory-of", json.dumps([shape, side, mode])]
        output = subprocess.run(
            [*command, "--threads", str(options.threads)], check=True, capture_output=True, text=True
        ).stdout
        figures[f"{side}_peak_mb"] = round(float(output), 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        shape, side, mode = json.loads(options.memory_of)
        print(peak_megabytes(SHAPES[shape], side, mode))
        return
    rows = []
    print(f"float32, {options.threads} threads, torch {torch.__version__}")
    for shape in SHAPES:
        for mode in MODES:
            row = measure(shape, mode, options)
            rows.append(row)
            speed = float(row["ours_bytes_per_s"]) / float(row["transformers_bytes_per_s"])
            memory = float(row["ours_peak_mb"]) / float(row["transformers_peak_mb"])
            print(
                f"{shape:>10} {mode:<19} {row['ours_bytes_per_s']:>8,} bytes/s against "
                f"{row['transformers_bytes_per_s']:>8,} ({speed:.2f} x); {row['ours_peak_mb']:,.0f} MB against "
                f"{row['transformers_peak_mb']:,.0f} ({memory:.2f} x); logits differ by {row['largest_difference']:.0e}"
            )
    worst = min(rows, key=lambda row: float(row["ours_bytes_per_s"]) / float(row["transformers_bytes_per_s"]))
    ours, reference = float(worst["ours_bytes_per_s"]), float(worst["transformers_bytes_per_s"])
    summary = {"ours": ours, "reference": reference, "ratio": round(ours / reference, 2), "unit": "bytes/s"}
    print(json.dumps({"bench": "forward", **summary, "threads": options.threads, "all": rows}))


if __name__ == "__main__":
    main()
