"""A real run on the GPU: entropy LM, scoring and patching, and a BLT of about 50M parameters, on real text.

    python -m tools.bench.gpu.real_run --budget 480

The text is the FineWeb-Edu sample ($BLT_SAMPLE, or beside the checkout; made up text where there is none). Every stage
is the packages' own: `blt_train.train`, `blt_patcher.precompute`, `blt_train.evaluate`, `blt_train.generate`. The
budget decides how many steps are taken. The last line is JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tools.bench.gpu.entropy_job import memory_folder, write_shards
from tools.bench.gpu.harness import Row, Settings, report, settings
from tools.bench.gpu.texts import documents

from blt_data import ShardDirectory
from blt_model.weights import load_model
from blt_patcher import EntropyScheme
from blt_patcher.calibrate import calibrate, take_sample
from blt_patcher.entropies import EntropyScorer, load_entropy_model
from blt_patcher.precompute import precompute
from blt_train import evaluate, generate, load_config, train
from blt_train.metrics import StepMetrics
from blt_train.trainer import TrainResult

PATCH_LENGTH = 4.5
ENTROPY_LM = {"dim": 512, "num_layers": 8, "num_heads": 8, "window": 512}
LOCAL = {"dim": 384, "num_heads": 6, "window": 512}
BLT_SHAPE: dict[str, Any] = {
    "encoder": {**LOCAL, "num_layers": 1},
    "latent": {"dim": 768, "num_layers": 5, "num_heads": 12},
    "decoder": {**LOCAL, "num_layers": 3},
    "cross_attention": {"num_heads": 6},
    "hash_embedding": {"table_size": 3000},
}
"""53 million parameters, 7 million of them in hash tables: the text is small."""
TEXT_BYTES = 18_000_000
"""Less than the sample has, so that no document is there twice, once to train on and once held out."""
EPOCHS = 5
"""Times through the text after which the BLT would begin to learn it by heart."""


def stage_config(run: Settings, folder: Path, kind: str, steps: int, **values: Any) -> Any:
    """The config of a training run, as its YAML file would say it."""
    preset = (
        {"entropy": "entropy-debug", "blt": "blt-debug"} if run.tiny else {"entropy": "entropy-tiny", "blt": "blt-tiny"}
    )
    overrides = {} if run.tiny else {"entropy": {"transformer": ENTROPY_LM}, "blt": BLT_SHAPE}[kind]
    document = {
        "run": str(folder / kind),
        "model": {"preset": preset[kind], "overrides": overrides},
        "device": run.device.type,
        "precision": "bfloat16" if run.device.type == "cuda" else "float32",
        "compile": run.device.type == "cuda",
        "batch": {"sequences_per_step": 2 if run.tiny else 16, "sequences_per_micro_batch": 2 if run.tiny else 16},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"total_steps": steps, "warmup_steps": max(1, steps // 10)},
        "checkpoint": {"every": steps},
        "evaluation": {"every": None if run.tiny else max(1, steps // 8)},
        **values,
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_config(str(path))


def split(rows: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Every thirtieth document is held out."""
    held = rows[29::30] or rows[-1:]
    return [row for index, row in enumerate(rows) if index % 30 != 29] if len(rows) >= 30 else rows[:-1], held


def figures(stage: str, result: TrainResult, seconds: float) -> Row:
    """What a training run gave."""
    steps: Sequence[StepMetrics] = result.steps
    # The first steps compile.
    late = steps[len(steps) // 2 :]
    taken = sum(metrics.seconds for metrics in late)
    return {
        "stage": stage,
        "seconds": seconds,
        "steps": len(steps),
        "bytes/s": sum(metrics.bytes for metrics in late) / taken,
        "bpb_first": steps[0].bpb,
        "bpb_last": steps[-1].bpb,
        "holdout_bpb_before": result.evaluations[0].holdout_bpb,
        "holdout_bpb": result.evaluations[-1].holdout_bpb,
        "curve": [round(metrics.bpb, 4) for metrics in steps[:: max(1, len(steps) // 40)]],
        "holdout_curve": [round(evaluation.holdout_bpb, 4) for evaluation in result.evaluations],
    }


def patches(run: Settings, folder: Path, model_path: Path) -> tuple[Row, EntropyScheme]:
    """Calibrate, score and patch both shard directories."""
    started = time.perf_counter()
    model = load_entropy_model(model_path)
    scorer = EntropyScorer(model, device=run.device, compile=None)
    train_bytes = ShardDirectory.open(folder / "bytes-train")
    sample = take_sample(train_bytes, 20_000 if run.tiny else 2_000_000)
    nats = scorer.score(sample.content, sample.content_offsets)
    target = 2.0 if run.tiny else PATCH_LENGTH
    found = calibrate(EntropyScheme(threshold=1.0), "threshold", target, sample.content, sample.content_offsets, nats)
    scheme = found.scheme
    if not isinstance(scheme, EntropyScheme):
        raise TypeError("calibration changed the scheme's kind")
    size = 0
    for part in ("train", "holdout"):
        source = ShardDirectory.open(folder / f"bytes-{part}")
        size += sum(entry.bytes for entry in source.manifest.shards)
        precompute(source, folder / f"patches-{part}", scheme=scheme, scorer=scorer)
    seconds = time.perf_counter() - started
    row = {"stage": "score and patch", "seconds": seconds, "bytes/s": size / seconds, "threshold": scheme.threshold}
    return row, scheme


def go(run: Settings, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """All stages in a folder."""
    rows = documents(60_000 if run.tiny else TEXT_BYTES)
    kept, held = split(rows)
    write_shards(kept, folder / "bytes-train")
    write_shards(held, folder / "bytes-holdout", shards=1)
    sequence = 256 if run.tiny else 8192
    data = {"sequence_tokens": sequence, "train": str(folder / "bytes-train"), "holdout": str(folder / "bytes-holdout")}
    most = EPOCHS * sum(map(len, kept)) // (16 * sequence)
    steps = (4, 4) if run.tiny else tuple(max(20, min(most, int(rate * run.budget))) for rate in (1.6, 3.5))
    started = time.perf_counter()
    entropy = train(stage_config(run, folder, "entropy", steps[0], data=data))
    table = [figures("entropy LM", entropy, time.perf_counter() - started)]
    row, _ = patches(run, folder, folder / "entropy")
    table.append(row)
    data = {
        "sequence_tokens": sequence,
        "train": str(folder / "patches-train"),
        "holdout": str(folder / "patches-holdout"),
    }
    started = time.perf_counter()
    config = stage_config(run, folder, "blt", steps[1], data=data, entropy_model=str(folder / "entropy"))
    result = train(config)
    table.append(figures("BLT", result, time.perf_counter() - started))
    parameters = sum(parameter.numel() for parameter in load_model(result.checkpoint).parameters())
    whole = evaluate(result.run, folder / "patches-holdout", device=run.device.type)
    started = time.perf_counter()
    text = bytes(generate(result.run, b"The ", max_new_bytes=20 if run.tiny else 300, device=run.device.type))
    seconds = time.perf_counter() - started
    table.append({"stage": "generate", "seconds": seconds, "bytes/s": len(text) / seconds})
    facts = {"parameters": parameters, "holdout_bpb": whole.bpb, "text": text.decode("utf-8", "replace")}
    return table, {**facts, "train_bytes": sum(map(len, kept)), "holdout_bytes": sum(map(len, held))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages and report."""
    run = settings(__doc__, arguments, budget=240)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        rows, facts = go(run, Path(folder))
    print(facts["text"])
    report("real_run", run, rows, **facts)


if __name__ == "__main__":
    main()
