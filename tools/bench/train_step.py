"""A training step of our BLT against transformers' BltForCausalLM: same weights, same text, same patches, same AdamW.

Run from the repository's root, on an otherwise idle machine:

    uv run python -m tools.bench.train_step --lengths 1024,1024,1024,1024
    uv run python -m tools.bench.train_step --lengths 2048,1024,640,384

The text is this Python's own standard library, cut at the space scheme's boundaries. transformers takes the documents
of a batch as rows padded to the longest, ours end to end; bytes per second count no padding. Both sides take turns, so
that a change in the machine's speed hits both; the figure is the median step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from tests.blt_model.transformers_map import blt_weights, their_blt

from blt_data import frame
from blt_model import BLT, BLTConfig, pack_documents, preset
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


def stepper(model: torch.nn.Module, logits: Callable[[], torch.Tensor], targets: torch.Tensor) -> Callable[[], float]:
    """A function that makes one training step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        loss = torch.nn.functional.cross_entropy(logits().flatten(0, -2).float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,1024,1024,1024", help="Input tokens of each document.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    config = bench_config()
    theirs = their_blt(config, attention="sdpa")
    ours = BLT(config)
    ours.load_state_dict(blt_weights(theirs.state_dict(), config))
    parameters = sum(parameter.numel() for parameter in ours.parameters())

    lengths = [int(length) for length in options.lengths.split(",")]
    documents, patches = sample_rows(lengths)
    batch, targets = pack_documents(documents, patches)
    inputs, table, padded_targets = padded(documents, patches)
    steps = {
        "ours": stepper(ours, lambda: ours(batch), targets),
        "transformers": stepper(
            theirs, lambda: theirs(inputs, patch_lengths=table, use_cache=False).logits, padded_targets
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            losses[name].append(step())
            if repeat:  # the first is warm-up
                seconds[name].append(time.perf_counter() - started)
    tokens = sum(lengths)
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    gap = max(abs(a - b) for a, b in zip(losses["ours"], losses["transformers"], strict=True))
    print(f"{parameters:,} parameters, documents of {options.lengths} bytes, float32, {options.threads} threads")
    print(f"mean patch length {tokens / sum(map(len, patches)):.2f}; largest difference of losses {gap:.1e}")
    for name, value in speed.items():
        print(f"{name:>12}: {value:>10,.0f} bytes/s  ({tokens / value * 1e3:,.0f} ms a step)")
    print(
        json.dumps(
            {
                "bench": "train_step",
                "ours": round(speed["ours"]),
                "reference": round(speed["transformers"]),
                "ratio": round(speed["ours"] / speed["transformers"], 2),
                "unit": "bytes/s",
                "parameters": parameters,
                "lengths": lengths,
                "threads": options.threads,
                "torch": torch.__version__,
                "loss_gap": gap,
            }
        )
    )


if __name__ == "__main__":
    main()
