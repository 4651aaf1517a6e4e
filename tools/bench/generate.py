"""Cached generation against transformers' uncached generation, with the same weights, patcher and prompts.

Run from the repository's root, on an otherwise idle machine:

    uv run python -m tools.bench.generate
    uv run python -m tools.bench.generate --model 150m --reference-lengths 200,1000,2000

The weights are random, the prompts this Python's own standard library. transformers' `generate()` of a BLT fails as
shipped, so the reference is what it would do without cache: one forward over everything, patcher included, for each
byte. That is measured on a few bytes only (`--reference-bytes`), and where `--reference-lengths` says. Ours generates
`--bytes` bytes from every prompt; its rate counts the forward over the prompt too, unless it says "steps". Both sides
take the likeliest byte. Entropies of random weights say nothing, so the threshold lies above them all and
`max_patch_length` cuts every fourth byte: both sides run their entropy model all the same, and patches are as long in
every row of the table.

Latent steps are those that generation counted; beside them stand the patches of the finished texts, cut anew by the
batch kernel from entropies of whole documents. The last line is JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tools.bench.train_step import bench_config

from blt_data import frame
from blt_model import (
    BLT,
    BLTConfig,
    ByteLM,
    ByteLMConfig,
    Completion,
    Generator,
    Request,
    next_byte_entropy,
    pack_documents,
    preset,
)
from blt_model.weights import save_transformers
from blt_patcher import EntropyScheme, IncrementalPatcher, patch_document, scheme_to_json

SMALL, LARGE = "28m", "150m"


@dataclass(frozen=True)
class Ours:
    """One measurement of our side."""

    prompt_bytes: int
    batch: int
    bytes_per_second: float
    steps_per_second: float
    """Of the steps alone, each of which gives a byte to every row."""
    prefill_seconds: float
    generated: int
    latent_steps: int
    patches: int
    """Of the finished texts, counted anew."""


@dataclass(frozen=True)
class Models:
    """Both sides, with the same weights."""

    blt: BLT
    entropy_model: ByteLM
    scheme: EntropyScheme
    theirs: Any

    @property
    def parameters(self) -> int:
        """Of the BLT and the entropy model together."""
        return sum(p.numel() for model in (self.blt, self.entropy_model) for p in model.parameters())


def configs(name: str) -> tuple[BLTConfig, ByteLMConfig]:
    """A BLT with the released models' proportions, and an entropy model."""
    lm = preset("entropy-tiny", transformer={"dim": 192, "num_heads": 6, "num_layers": 5, "window": 512})
    blt = bench_config()
    if name == LARGE:
        large = preset(
            "blt-tiny",
            encoder={"dim": 512, "num_heads": 8, "window": 512},
            latent={"dim": 1024, "num_heads": 16, "num_layers": 9},
            decoder={"dim": 512, "num_heads": 8, "window": 512, "num_layers": 5},
            cross_attention={"num_heads": 8},
            hash_embedding={"table_size": 1500},
        )
        assert isinstance(large, BLTConfig)
        blt = large
    assert isinstance(lm, ByteLMConfig)
    return blt, lm


def entropies_of(model: ByteLM, content: bytes) -> np.ndarray[Any, np.dtype[np.float16]]:
    """float16 entropies after every framed token of a document."""
    with torch.no_grad():
        values = next_byte_entropy(model(pack_documents([np.append(frame(content), 0)])[0]))
    result: np.ndarray[Any, np.dtype[np.float16]] = values.numpy().astype(np.float16)
    return result


def prepare(name: str) -> Models:
    """Random weights, patches of four bytes, and transformers' copy of all."""
    from transformers.models.blt.modeling_blt import BltForCausalLM

    blt_config, lm_config = configs(name)
    blt, lm = BLT(blt_config).eval(), ByteLM(lm_config).eval()
    with torch.no_grad():
        # Documents that end early would cost both sides nothing, and measure nothing.
        blt.decoder.head.weight[2] = 0
    scheme = EntropyScheme(threshold=100.0, max_patch_length=4)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_transformers(blt, directory, entropy_model=lm, patching=scheme_to_json(scheme))
        theirs = BltForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
        theirs.train(False)
    return Models(blt, lm, scheme, theirs)


def measure_ours(models: Models, prompts: Sequence[bytes], new_bytes: int) -> Ours:
    """Generate once from all prompts side by side."""
    generator = Generator(
        models.blt,
        new_patcher=lambda: IncrementalPatcher(models.scheme),
        entropy_model=models.entropy_model,
        rows=len(prompts),
    )
    requests = [Request(prompt=prompt, max_new_bytes=new_bytes) for prompt in prompts]
    done: dict[int, Completion] = {}
    started = time.perf_counter()
    first = started
    for index, event in generator.events(requests):
        if first == started:
            first = time.perf_counter()
        if isinstance(event, Completion):
            done[index] = event
    ended = time.perf_counter()
    generated = sum(len(completion.content) for completion in done.values())
    patches = 0
    for index, completion in done.items():
        content = prompts[index] + completion.content
        lengths = patch_document(models.scheme, content, entropies_of(models.entropy_model, content))
        # Patches that are complete once all bytes but the last have been read.
        patches += int((np.cumsum(lengths) <= len(content)).sum()) - completion.prompt_patches
    return Ours(
        prompt_bytes=len(prompts[0]),
        batch=len(prompts),
        bytes_per_second=generated / (ended - started),
        steps_per_second=(new_bytes - 1) / (ended - first),
        prefill_seconds=first - started,
        generated=generated,
        latent_steps=sum(completion.patches for completion in done.values()),
        patches=patches,
    )


def measure_theirs(models: Models, prompts: Sequence[bytes], new_bytes: int) -> float:
    """Bytes per second of a forward over everything for each byte."""
    tokens = torch.tensor([[1, *(byte + 4 for byte in prompt)] for prompt in prompts])
    times = []
    with torch.inference_mode():
        for _ in range(new_bytes):
            started = time.perf_counter()
            logits = models.theirs(input_ids=tokens, use_cache=False).logits[:, -1]
            logits[:, :4] = -torch.inf
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
            times.append(time.perf_counter() - started)
    return len(prompts) / statistics.median(times)


def bench(models: Models, text: bytes, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every prompt length and batch size; ours `--repeats` times, in turns over the lengths."""
    lengths = [int(value) for value in options.lengths.split(",")]
    wanted = [int(value) for value in options.reference_lengths.split(",") if value]
    rows = []
    for batch in (int(value) for value in options.batches.split(",")):
        prompts = {n: [text[start * 997 :][:n] for start in range(batch)] for n in lengths}
        runs: dict[int, list[Ours]] = {n: [] for n in lengths}
        measure_ours(models, prompts[lengths[0]], 20)
        for _ in range(options.repeats):
            for n in lengths:
                runs[n].append(measure_ours(models, prompts[n], options.bytes))
        for n in lengths:
            theirs = measure_theirs(models, prompts[n], options.reference_bytes) if n in wanted else None
            ours = sorted(runs[n], key=lambda run: run.bytes_per_second)[len(runs[n]) // 2]
            steps = statistics.median(run.steps_per_second for run in runs[n])
            row = {**asdict(ours), "steps_per_second": steps, "reference": theirs}
            row["ratio"] = None if theirs is None else ours.bytes_per_second / theirs
            rows.append(row)
            show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    reference = "not measured" if row["reference"] is None else f"{row['reference']:.2f} bytes/s"
    ratio = "" if row["ratio"] is None else f", {row['ratio']:.0f} x"
    print(
        f"  prompts of {row['prompt_bytes']:>5,} bytes, batch {row['batch']}: {row['bytes_per_second']:>7.1f} bytes/s, "
        f"steps {1e3 / row['steps_per_second']:.2f} ms, prefill {row['prefill_seconds']:.2f} s, latent steps "
        f"{row['latent_steps']} = patches {row['patches']} of {row['generated']} bytes; transformers "
        f"{reference}{ratio}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[SMALL, LARGE], default=SMALL)
    parser.add_argument("--lengths", default="200,1000,2000,8000", help="Prompt bytes.")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--bytes", type=int, default=200, help="Bytes that ours generates from each prompt.")
    parser.add_argument("--reference-lengths", default="200,1000,2000", help="Where transformers is measured too.")
    parser.add_argument("--reference-bytes", type=int, default=3, help="Bytes that transformers generates.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text = (inspect.getsource(argparse) + inspect.getsource(inspect)).encode()
    models = prepare(options.model)
    print(
        f"{models.parameters:,} parameters (entropy model included), float32, {options.threads} threads; transformers "
        f"measured on {options.reference_bytes} bytes, ours on {options.bytes} a prompt, prompt's forward included"
    )
    rows = bench(models, text, options)
    headline = next((row for row in rows if row["prompt_bytes"] == 2000 and row["batch"] == 1), rows[-1])
    steps = {row["prompt_bytes"]: row["steps_per_second"] for row in rows if row["batch"] == 1}
    growth = steps[200] / steps[8000] if {200, 8000} <= set(steps) else None
    if growth is not None:
        print(f"time of a step at 8,000 bytes / at 200: {growth:.2f}")
    print(
        json.dumps(
            {
                "bench": "generate",
                "ours": headline["bytes_per_second"],
                "reference": headline["reference"],
                "ratio": headline["ratio"],
                "unit": "bytes/s",
                "prompt_bytes": headline["prompt_bytes"],
                "batch": headline["batch"],
                "growth_200_to_8000": growth,
                "counts_agree": all(row["latent_steps"] == row["patches"] for row in rows),
                "parameters": models.parameters,
                "reference_bytes": options.reference_bytes,
                "threads": options.threads,
                "torch": torch.__version__,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
