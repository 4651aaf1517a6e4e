"""Generation on the GPU: bytes a second, milliseconds a byte, and the share of what reading the weights allows.

    python -m tools.bench.gpu.generation
    python -m tools.bench.gpu.generation --cases rows1/ --budget 60
    python -m tools.bench.gpu.generation --profile --cases rows1/context1000

`blt-1b` with `entropy-100m`, random weights in bfloat16, patches of four bytes, CUDA graphs. The floor is the weights
that must be read for one byte (entropy model, encoder, decoder; latent transformer and all that happens once a patch
divided by the patch length) and the keys and values that attention must read, over the bandwidth of a large copy
measured here. With one text the queries and outputs with which the decoder reads a patch are needed once a patch (see
`blt_model.generation.absorbed`); *of_plain_floor* counts them for every byte. Steps only: the prompt's own forward is
reported apart. The last line is JSON.

With `--profile` it prints the kernels of one case instead, by torch's profiler, in microseconds a byte.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from tools.bench.gpu.harness import Row, Settings, copy_bandwidth, report, settings, wait
from tools.bench.gpu.profiles import kernels_of
from tools.bench.gpu.texts import documents
from torch import nn

from blt_model import BLT, BLTConfig, ByteLM, ByteLMConfig, Generator, Request, TransformerConfig, preset
from blt_patcher import EntropyScheme, IncrementalPatcher

PATCH_LENGTH = 4
TINY_CASES = ((1, 20), (2, 20))
CASES = ((1, 1_000), (1, 8_000), (8, 1_000), (64, 1_000), (8, 8_000), (64, 8_000))
"""Rows and prompt bytes."""


def bytes_of(*modules: nn.Module | nn.Parameter | None) -> int:
    """Bytes of all weights."""
    total = 0
    for module in modules:
        if isinstance(module, nn.Parameter):
            total += module.numel() * module.element_size()
        elif module is not None:
            total += sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return total


def cache_bytes(config: TransformerConfig, length: float) -> float:
    """Bytes of bfloat16 keys and values that a new position of a stack reads after so many."""
    held = length if config.window is None else min(length, config.window)
    return 2 * 2 * config.num_layers * held * config.kv_heads * config.head_dim


def floor_bytes(model: BLT, lm: ByteLM, rows: int, context: float, *, absorbs: bool) -> float:
    """Bytes that a step must read: a byte for every row, with one row in PATCH_LENGTH completing a patch.

    Rows share the weights; the latent transformer's are read whenever any row completes a patch, and rows of equal
    prompts complete theirs together.

    Args:
        model: with its
        lm: entropy model.
        rows: texts at once.
        context: bytes before the new one.
        absorbs: the weights of the decoder's queries and outputs are multiplied into a patch's keys and values.
    """
    config = model.config
    cross: list[Any] = list(model.decoder.cross_attention.values())
    # Keys and values of patches are made once a patch, queries and outputs for every byte.
    once, absorbed = bytes_of(*(layer.key_value for layer in cross), model.decoder.patch_projection), 0
    if absorbs:
        once += bytes_of(*(layer.query for layer in cross), *(layer.output for layer in cross))
        absorbed = len(cross) * 2 * 2 * config.cross_attention.num_heads * config.cross_attention.k * config.decoder.dim
    per_patch = once + bytes_of(model.latent, model.encoder.patch_projection, model.encoder.cross_attention)
    per_byte = bytes_of(lm.blocks, lm.head, model.encoder.blocks, model.decoder) - once
    hashes = config.hash_embedding.num_tables * config.encoder.dim * 2
    caches = cache_bytes(lm.config.transformer, context)
    caches += cache_bytes(config.encoder, context) + cache_bytes(config.decoder, context)
    caches += cache_bytes(config.latent, context / PATCH_LENGTH) / PATCH_LENGTH
    return per_byte + per_patch / PATCH_LENGTH + rows * (caches + hashes + absorbed)


def make_models(run: Settings) -> tuple[BLT, ByteLM]:
    """Random weights; documents never end by themselves."""
    device, half = run.device, torch.bfloat16 if run.device.type == "cuda" else torch.float32
    names = ("blt-debug", "entropy-debug") if run.tiny else ("blt-1b", "entropy-100m")
    config, lm_config = preset(names[0]), preset(names[1])
    if not isinstance(config, BLTConfig) or not isinstance(lm_config, ByteLMConfig):
        raise TypeError("the presets are not a blt and a byte-lm")
    torch.manual_seed(0)
    with torch.device(device):
        model, lm = BLT(config).to(half).eval(), ByteLM(lm_config).to(half).eval()
    with torch.no_grad():
        model.decoder.head.weight[2] = 0
    return model, lm


def generator_of(model: BLT, lm: ByteLM, rows: int) -> Generator:
    """What makes patches of PATCH_LENGTH bytes."""
    scheme = EntropyScheme(threshold=100.0, max_patch_length=PATCH_LENGTH)
    return Generator(
        model, new_patcher=lambda: IncrementalPatcher(scheme), entropy_model=lm, rows=rows, prefill_tokens=65_536
    )


def requests_of(rows: int, prompt_bytes: int, new_bytes: int) -> list[Request]:
    """Texts of equal lengths."""
    texts = b"\n".join(documents((prompt_bytes + 8) * rows))
    prompts = [texts[row * prompt_bytes : (row + 1) * prompt_bytes] for row in range(rows)]
    return [Request(prompt=prompt, max_new_bytes=new_bytes) for prompt in prompts]


def profile(model: BLT, lm: ByteLM, rows: int, prompt_bytes: int, run: Settings) -> list[Row]:
    """The kernels of some whole patches."""
    new_bytes, warm = 160 * PATCH_LENGTH, 24 * PATCH_LENGTH
    requests = requests_of(rows, prompt_bytes, new_bytes)
    events = (event for _, event in generator_of(model, lm, rows).events(requests) if isinstance(event, bytes))
    taken = 0

    def take(count: int) -> None:
        nonlocal taken
        while taken < count * rows:
            taken += len(next(events))

    take(warm)
    found = kernels_of(lambda: take(warm + 100 * PATCH_LENGTH), run.device, of=100 * PATCH_LENGTH)
    return [{"case": f"rows{rows}/context{prompt_bytes}", **row} for row in found]


def measure(model: BLT, lm: ByteLM, rows: int, prompt_bytes: int, run: Settings, bandwidth: float) -> Row:
    """Figures of one batch size and context."""
    new_bytes = 12 if run.tiny else 400 if rows == 1 else 160
    warm = 8 if run.tiny else 48
    generator, requests = generator_of(model, lm, rows), requests_of(rows, prompt_bytes, new_bytes)
    started = time.perf_counter()
    count, seconds, measured, prefill = 0, 0.0, 0, 0.0
    for _, event in generator.events(requests):
        if not isinstance(event, bytes):
            continue
        count += len(event)
        if count == rows:
            wait(run.device)
            prefill = time.perf_counter() - started
        if count == warm * rows:
            # Graphs are captured by now: several patches have been completed.
            started = time.perf_counter()
        elif count > warm * rows and count % rows == 0:
            seconds, measured = time.perf_counter() - started, count - warm * rows
    step = seconds / (measured / rows)
    floor, plain_floor = (
        floor_bytes(model, lm, rows, prompt_bytes + new_bytes / 2, absorbs=absorbs) / bandwidth
        for absorbs in (rows == 1, False)
    )
    return {
        "case": f"rows{rows}/context{prompt_bytes}",
        "bytes/s": measured / seconds,
        "ms/step": 1e3 * step,
        "floor_ms": 1e3 * floor,
        "of_floor": floor / step,
        "of_plain_floor": plain_floor / step,
        "first_byte_s": prefill,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases for which there is time."""
    run = settings(__doc__, arguments, budget=90, switches={"profile": "Print the kernels of a byte."})
    bandwidth = copy_bandwidth(run.device)
    model, lm = make_models(run)
    rows: list[Row] = []
    for batch, prompt in TINY_CASES if run.tiny else CASES:
        if run.wants(f"rows{batch}/context{prompt}"):
            if "profile" in run.switches:
                rows += profile(model, lm, batch, prompt, run)
            else:
                rows.append(measure(model, lm, batch, prompt, run, bandwidth))
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
    facts: dict[str, Any] = {"patch_length": PATCH_LENGTH, "copy_bandwidth": bandwidth}
    report("generation_profile" if "profile" in run.switches else "generation", run, rows, **facts)


if __name__ == "__main__":
    main()
