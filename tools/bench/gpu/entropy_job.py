"""The entropy job on the GPU: shards in, entropies and patches out.

    python -m tools.bench.gpu.entropy_job

- *job*: `precompute` whole: shards read and verified, scored, cut into patches, written with entropies.
- *score*: the scorer alone on documents that lie in memory.
- *bare*: its step on a full window that lies on the device already, again and again.

All in float16, the default, and in bfloat16; in float16 nothing is compiled.

`mfu` is the share of the datasheet's dense bfloat16 rate that the model's own operations reach. Documents have
FineWeb-Edu's lengths. The last line is JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

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
)
from tools.bench.gpu.profiles import time_by_kind
from tools.bench.gpu.texts import documents

from blt_data import Manifest, ShardDirectory, ShardKind, write_manifest, write_shard
from blt_model import ByteLM, ByteLMConfig, preset
from blt_model.flops import byte_lm_flops
from blt_patcher import EntropyScheme
from blt_patcher.entropies import EntropyScorer
from blt_patcher.precompute import precompute


def flops_per_byte(config: ByteLMConfig, rows: Sequence[bytes]) -> float:
    """Forward operations a byte, exact over these documents."""
    lengths = [len(row) + 2 for row in rows]
    total = sum(length * byte_lm_flops(config, document_bytes=length)["total"] for length in lengths)
    return total / sum(map(len, rows))


def write_shards(rows: list[bytes], folder: Path, shards: int = 2) -> ShardDirectory:
    """Byte shards of the documents, in a folder that should lie in memory."""
    folder.mkdir()
    entries = []
    for number in range(shards):
        part = rows[number::shards]
        entries.append(
            write_shard(
                folder / f"shard-{number:05}.arrow",
                kind=ShardKind.BYTES,
                document_ids=[f"{number}-{row}" for row in range(len(part))],
                contents=part,
                sources=["bench"] * len(part),
                provenance={},
            )
        )
    write_manifest(folder, Manifest(kind=ShardKind.BYTES, shards=tuple(entries)))
    return ShardDirectory.open(folder)


def memory_folder() -> str | None:
    """A file system in memory, where there is one."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() else None


def measure_step(scorer: EntropyScorer, run: Settings) -> tuple[tuple[float, int], dict[str, float]]:
    """Seconds of one full window and its tokens; and where the time goes."""
    device, window = run.device, scorer.capacity
    in_a_row = 1 if run.tiny else 10
    with scorer.arithmetic():
        state = scorer.begin()
        tokens = torch.randint(4, 260, (window,), device=device)
        cuts = torch.tensor([0, window // 3, *[window] * 3], dtype=torch.int32, device=device)

        def steps() -> None:
            for _ in range(in_a_row):
                scorer.step(tokens, cuts, state)

        steps()
        taken = median_seconds(steps, device, repeats=1 if run.tiny else 4) / in_a_row
        return (taken, window), time_by_kind(lambda: scorer.step(tokens, cuts, state), device, top=12)


def measure_scorer(
    scorer: EntropyScorer, rows: list[bytes], run: Settings
) -> Iterator[tuple[str, float, int, dict[str, float]]]:
    """What is measured, its seconds and bytes (or tokens), and where the time goes, if that was looked at."""
    repeats = 1 if run.tiny else 2
    taken, kinds = measure_step(scorer, run)
    yield "bare", *taken, kinds
    size = sum(map(len, rows))
    content = np.frombuffer(b"".join(rows), dtype=np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    yield "score", median_seconds(lambda: scorer.score(content, offsets), run.device, repeats=repeats), size, {}
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        source = write_shards(rows, Path(folder, "bytes"))

        def job() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as output:
                scheme = EntropyScheme(threshold=1.3)
                precompute(source, output, scheme=scheme, scorer=scorer, keep_entropies=True)

        yield "job", median_seconds(job, run.device, repeats=repeats), size, {}


def measure(run: Settings, ceiling: float, peak: float | None) -> list[Row]:
    """Figures of job, scorer and step in each precision."""
    device = run.device
    config = preset("entropy-debug" if run.tiny else "entropy-100m")
    if not isinstance(config, ByteLMConfig):
        raise TypeError("the preset is no byte-lm")
    torch.manual_seed(0)
    model = ByteLM(config).to(device).eval()
    rows = documents(4_000 if run.tiny else 6_000_000)
    operations = flops_per_byte(config, rows)
    figures: list[Row] = []
    for precision in ("float16", "bfloat16"):
        # One name is part of the other.
        if run.left <= 0 or (run.cases and precision not in run.cases):
            continue
        scorer = EntropyScorer(
            model,
            device=device,
            window_tokens=1024 if run.tiny else None,
            precision=precision,
            compile=device.type == "cuda" and precision == "bfloat16",
        )
        for what, seconds, amount, kinds in measure_scorer(scorer, rows, run):
            rate = amount / seconds
            row: Row = {"precision": precision, "what": what, "bytes/s": rate, "TFLOP/s": rate * operations / 1e12}
            row |= {"mfu": None if peak is None else rate * operations / peak, "of_matmul": rate * operations / ceiling}
            if kinds:
                print(precision, kinds, flush=True)
                row["ms_by_kind"] = kinds
            figures.append(row)
            # At once: a run that is cut short has shown what it found.
            print(row, flush=True)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    run = settings(__doc__, arguments, budget=90)
    ceiling, bandwidth, peak = matmul_rate(run.device), copy_bandwidth(run.device), peak_rate(run.device)
    rows = measure(run, ceiling, peak)
    report("entropy_job", run, rows, matmul_flops=ceiling, copy_bandwidth=bandwidth, peak_flops=peak)


if __name__ == "__main__":
    main()
