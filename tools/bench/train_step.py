"""A training step of our BLT against transformers' BltForCausalLM: same weights, same text, same patches, same AdamW.

Run from the repository's root, on an otherwise idle machine:

    uv run python -m tools.bench.train_step --lengths 1024,1024,1024,1024
    uv run python -m tools.bench.train_step --lengths 2048,1024,640,384

The text is this Python's own standard library, cut at the space scheme's boundaries. transformers takes the documents
of a batch as rows padded to the longest, ours end to end; bytes per second count no padding. All sides take turns, so
that a change in the machine's speed hits all; the figure is the median step. The last line is JSON.

Rows: both sides in float32 (the main figure); both under bfloat16 autocast, where matrix products take a small part and
all else counts; and transformers with AdamW as torch makes it by default (one pass per operation instead of a fused
one). Beside them stands the floor of float32: the operations of a step (`blt_model.flops`), which all are matrix
products and attention, at the rate that one large matrix product reaches on this machine.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tests.blt_model.transformers_map import blt_weights, their_blt

from blt_data import frame
from blt_model import BLT, BLTConfig, pack_documents, preset
from blt_model.flops import blt_flops
from blt_patcher import SpaceScheme, patch_document

Tokens = npt.NDArray[np.uint16]


def bench_config() -> BLTConfig:
    """A BLT of 28 million parameters with the released models' proportions."""
    config = preset(
        "blt-tiny",
        encoder={"dim": 256, "num_heads": 8, "window": 512},
        latent={"dim": 512, "num_heads": 16, "num_layers": 5},
        decoder={"dim": 256, "num_heads": 8, "window": 512, "num_layers": 4},
        cross_attention={"num_heads": 8},
        hash_embedding={"table_size": 1500},
    )
    if not isinstance(config, BLTConfig):
        raise TypeError("blt-tiny is no BLT")
    return config


def sample_rows(lengths: list[int]) -> tuple[list[Tokens], list[Tokens]]:
    """Framed documents of so many inputs (framed tokens less one), and their patch lengths."""
    text = inspect.getsource(argparse).encode() + inspect.getsource(inspect).encode()
    documents, patches = [], []
    for row, length in enumerate(lengths):
        content = text[row * 3001 :][: length - 1]
        documents.append(frame(content))
        patches.append(patch_document(SpaceScheme(max_patch_length=16), content))
    return documents, patches


def padded(documents: list[Tokens], patches: list[Tokens]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, patch lengths and targets as transformers takes them: one row per document, padded to the longest.

    The padding of a row is one more patch; patch lengths are filled up with zeros.
    """
    longest = max(map(len, documents)) - 1
    inputs = torch.zeros(len(documents), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, -100)
    table = torch.zeros(len(patches), max(map(len, patches)) + 1, dtype=torch.int64)
    for row, (document, lengths) in enumerate(zip(documents, patches, strict=True)):
        tokens = torch.from_numpy(document.astype(np.int64))
        inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        table[row, : len(lengths)] = torch.from_numpy(lengths.astype(np.int64))
        table[row, len(lengths)] = longest + 1 - len(tokens)
    return inputs, table, targets.flatten()


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    bfloat16: bool = False
    """Both sides under autocast."""
    default_adamw: bool = False
    """The reference's optimizer as torch makes it by default; ours stays fused."""


ROWS = {
    "float32": Row("float32"),
    "bfloat16": Row("bfloat16 autocast", bfloat16=True),
    "default-adamw": Row("float32, reference's AdamW not fused", default_adamw=True),
}


def stepper(
    model: torch.nn.Module,
    logits: Callable[[], torch.Tensor],
    targets: torch.Tensor,
    *,
    bfloat16: bool = False,
    fused: bool | None = True,
) -> Callable[[], float]:
    """A function that makes one training step and returns its loss.

    Args:
        model: whose parameters are trained.
        logits: runs it.
        targets: of the logits.
        bfloat16: run it under autocast.
        fused: AdamW's implementation; None is torch's default.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            outputs = logits()
        loss = torch.nn.functional.cross_entropy(outputs.flatten(0, -2).float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(row: Row, lengths: list[int], repeats: int) -> dict[str, float | str]:
    """Both sides of a row, from the same fresh weights, in turns."""
    torch.manual_seed(0)
    config = bench_config()
    theirs = their_blt(config, attention="sdpa")
    ours = BLT(config)
    ours.load_state_dict(blt_weights(theirs.state_dict(), config))
    documents, patches = sample_rows(lengths)
    batch, targets = pack_documents(documents, patches)
    inputs, table, padded_targets = padded(documents, patches)
    steps = {
        "ours": stepper(ours, lambda: ours(batch), targets, bfloat16=row.bfloat16),
        "transformers": stepper(
            theirs,
            lambda: theirs(inputs, patch_lengths=table, use_cache=False).logits,
            padded_targets,
            bfloat16=row.bfloat16,
            fused=None if row.default_adamw else True,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            losses[name].append(step())
            if repeat:  # the first is warm-up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "row": row.name,
        "ours": round(sum(lengths) / medians["ours"]),
        "reference": round(sum(lengths) / medians["transformers"]),
        "ratio": round(medians["transformers"] / medians["ours"], 2),
        "ours_seconds": round(medians["ours"], 3),
        "reference_seconds": round(medians["transformers"], 3),
        "loss_gap": max(abs(a - b) for a, b in zip(losses["ours"], losses["transformers"], strict=True)),
    }


def matmul_rate() -> float:
    """Operations per second of one large float32 matrix product: the best of several."""
    one, other = torch.randn(4096, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        torch.mm(one, other)
        best = min(best, time.perf_counter() - started)
    return 2 * 4096 * 1024 * 1024 / best


def floor(lengths: list[int]) -> tuple[float, float]:
    """Bytes per second that float32 matrix products alone would allow, and their rate."""
    tokens = sum(lengths)
    _, patches = sample_rows(lengths)
    # Longer documents read longer contexts, so the mean over bytes is what counts.
    mean_length = sum(length * length for length in lengths) / tokens
    parts = blt_flops(bench_config(), patch_length=tokens / sum(map(len, patches)), document_bytes=mean_length)
    rate = matmul_rate()
    return rate / (3 * parts["total"]), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,1024,1024,1024", help="Input tokens of each document.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--rows", default=",".join(ROWS), help=f"Of {', '.join(ROWS)}; the first gives the main figure."
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = [int(length) for length in options.lengths.split(",")]
    parameters = sum(parameter.numel() for parameter in BLT(bench_config()).parameters())
    print(f"{parameters:,} parameters, documents of {options.lengths} bytes, {options.threads} threads")
    rows = []
    for name in options.rows.split(","):
        row = measure(ROWS[name], lengths, options.repeats)
        rows.append(row)
        print(
            f"{row['row']:<37} {row['ours']:>7,} bytes/s against {row['reference']:>7,}: {row['ratio']} x; "
            f"losses differ by {row['loss_gap']:.1e}",
            flush=True,
        )
    most, rate = floor(lengths)
    print(f"float32 products alone, at {rate / 1e9:.0f} GFLOP/s: {most:,.0f} bytes/s")
    head = {key: rows[0][key] for key in ("ours", "reference", "ratio")}
    print(
        json.dumps(
            {
                "bench": "train_step",
                **head,
                "unit": "bytes/s",
                "rows": rows,
                "floor": round(most),
                "matmul_gflops": round(rate / 1e9),
                "parameters": parameters,
                "lengths": lengths,
                "threads": options.threads,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
