"""Bytes a second of the entropy job, shards in and entropies out, against two other ways to use the same weights.

Run from the repository's root, on an otherwise idle machine:

    uv run python -m tools.bench.entropies
    uv run python -m tools.bench.entropies --device cuda --preset entropy-100m --text-bytes 18MB

- *padded*: one document at a time in chunks of 8,192 tokens that share nothing, the last one padded, as the released
  scorer works; once with this project's model, once with transformers' BltPatcher, where it is installed.
- *bare*: the model's forward pass alone, on full windows that lie on the device already.

The text is the sample of FineWeb-Edu's form beside the checkout, or this Python's standard library. The three take
turns, so that a change in the machine's speed hits all; figures are medians. On a machine that is not idle
`--clock cpu --threads 1` counts this process's own seconds. A padded chunk takes the same time
whatever it holds, so some are timed and the time of all is counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from blt_data import Manifest, ShardDirectory, ShardKind, write_manifest, write_shard
from blt_data.units import ByteSize
from blt_model import ByteLM, ByteLMConfig, PackedBatch, next_byte_entropy, preset
from blt_patcher import EntropyScheme
from blt_patcher.entropies import EntropyScorer
from blt_patcher.precompute import precompute

#: Tokens of the released scorer's chunks.
CHUNK = 8192

#: Chunks and windows that are timed in each turn.
TIMED = 4

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "fineweb-edu-sample"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is timed."""

    model: ByteLM
    theirs: Callable[[torch.Tensor], torch.Tensor] | None
    device: torch.device
    scorer: EntropyScorer
    source: ShardDirectory
    work: Path
    clock: Callable[[], float]

    @property
    def half(self) -> bool:
        """Whether the model runs in bfloat16."""
        return bool(self.scorer.settings["precision"] == "bfloat16")


def documents(limit: int, folder: Path | None) -> tuple[str, list[bytes]]:
    """Return the text's name and documents of about `limit` bytes, evenly spaced."""
    files = sorted((folder or SAMPLE).rglob("*.parquet"))
    if files:
        name = (folder or SAMPLE).name
        rows = [text.as_py().encode() for file in files for text in pq.read_table(file, columns=["text"]).column(0)]
    else:
        name = "standard library"
        library = Path(sysconfig.get_paths()["stdlib"])
        rows = [file.read_bytes() for file in sorted(library.glob("*.py"))]
    count = max(1, min(len(rows), round(len(rows) * limit / sum(map(len, rows)))))
    return name, [rows[(2 * index + 1) * len(rows) // (2 * count)] for index in range(count)]


def byte_shards(rows: list[bytes], folder: Path, shards: int) -> ShardDirectory:
    """Write documents as byte shards."""
    folder.mkdir()
    entries = []
    for number in range(shards):
        part = rows[number::shards]
        ids, sources = [f"{number}-{row}" for row in range(len(part))], ["bench"] * len(part)
        path = folder / f"shard-{number:05}.arrow"
        entries.append(
            write_shard(path, kind=ShardKind.BYTES, document_ids=ids, contents=part, sources=sources, provenance={})
        )
    write_manifest(folder, Manifest(kind=ShardKind.BYTES, shards=tuple(entries)))
    return ShardDirectory.open(folder)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def job_seconds(task: Task) -> float:
    """Seconds of the whole job: reading and verifying shards, scoring, cutting, writing with entropies."""
    with tempfile.TemporaryDirectory(dir=task.work) as output:
        started = task.clock()
        precompute(task.source, output, scheme=EntropyScheme(threshold=1.3), scorer=task.scorer, keep_entropies=True)
        return task.clock() - started


def timed(task: Task, forward: Callable[[torch.Tensor], torch.Tensor], length: int) -> float:
    """Seconds for one forward pass of `length` tokens and their entropies."""
    tokens = torch.randint(4, 260, (length,), device=task.device)
    with torch.inference_mode(), torch.autocast(task.device.type, torch.bfloat16, enabled=task.half):
        wait(task.device)
        started = task.clock()
        for _ in range(TIMED):
            forward(tokens)
        wait(task.device)
        return (task.clock() - started) / TIMED


def padded_forward(model: ByteLM) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(tokens: torch.Tensor) -> torch.Tensor:
        offsets = torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device)
        return next_byte_entropy(model(PackedBatch(tokens=tokens, document_offsets=offsets))).cpu()

    return forward


def transformers_forward(model: ByteLM) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The released scorer's form in transformers; our model takes its weights. None where it is not installed."""
    try:
        from tests.blt_model.transformers_map import byte_lm_weights, their_patcher
    except ImportError:
        return None
    theirs = their_patcher(model.config, attention="sdpa")
    theirs.train(False)
    model.load_state_dict(byte_lm_weights(theirs.state_dict(), model.config))
    theirs.to(next(model.parameters()).device)  # type: ignore[arg-type]  # transformers wraps the method

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        entropies: torch.Tensor = theirs(tokens[None], patch_size=None, threshold=1.3, max_patch_length=None)[0]
        return entropies.cpu()

    return forward


def bare_forward(scorer: EntropyScorer) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same arithmetic as the job's, on a window that one document fills."""
    state = scorer.begin()

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        offsets = torch.tensor([0, *[len(tokens)] * 3], dtype=torch.int32, device=tokens.device)
        with scorer.arithmetic():
            return scorer.step(tokens, offsets, state)[0]

    return forward


def measure(task: Task, repeats: int) -> dict[str, float]:
    """Return median seconds: of the job, of a padded chunk in both forms, of a bare window."""
    window = task.scorer.capacity
    sides: dict[str, Callable[[], float]] = {
        "job": lambda: job_seconds(task),
        "padded": lambda: timed(task, padded_forward(task.model), CHUNK),
        "bare": lambda: timed(task, bare, window),
    }
    bare = bare_forward(task.scorer)
    if (theirs := task.theirs) is not None:
        sides["transformers"] = lambda: timed(task, theirs, CHUNK)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            taken = side()
            if repeat:  # the first is warm-up
                seconds[name].append(taken)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="entropy-tiny", help="Architecture; the weights are random.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text-bytes", default="600kB")
    parser.add_argument("--text", type=Path, help="Folder with Parquet files that have a column text.")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--window-tokens", type=int)
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="[on a GPU, but not in float16]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine that is not idle.")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config, device = preset(options.preset), torch.device(options.device)
    if not isinstance(config, ByteLMConfig):
        raise SystemExit(f"{options.preset} is no entropy model")
    model = ByteLM(config).to(device).eval()
    theirs = transformers_forward(model)
    scorer = EntropyScorer(
        model,
        device=device,
        window_tokens=options.window_tokens,
        precision=options.precision,
        compile=options.compile,
    )
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    name, rows = documents(ByteSize().convert(options.text_bytes, None, None), options.text)
    with tempfile.TemporaryDirectory() as folder:
        source = byte_shards(rows, Path(folder) / "bytes", options.shards)
        task = Task(
            model=model, theirs=theirs, device=device, scorer=scorer, source=source, work=Path(folder), clock=clock
        )
        seconds = measure(task, options.repeats)
    report(name, rows, task, seconds)


def report(name: str, rows: list[bytes], task: Task, seconds: dict[str, float]) -> None:
    size = sum(map(len, rows))
    lengths = np.array([len(row) + 2 for row in rows])
    chunks = int((-(-lengths // CHUNK)).sum())
    window = task.scorer.capacity
    speeds = {
        "job": size / seconds["job"],
        "padded": size / (chunks * seconds["padded"]),
        "bare": size / (lengths.sum() * seconds["bare"] / window),
    }
    if "transformers" in seconds:
        speeds["padded, transformers"] = size / (chunks * seconds["transformers"])
    print(
        f"{name}: {len(rows)} documents, {size:,} bytes; {chunks * CHUNK / lengths.sum():.2f} tokens a token if padded"
    )
    clock = "wall" if task.clock is time.perf_counter else "cpu"
    print(f"{clock} clock, " + ", ".join(f"{key} {value}" for key, value in task.scorer.settings.items()))
    for side, speed in speeds.items():
        ratio = "" if side == "job" else f"   the job is {speeds['job'] / speed:.2f} times as fast"
        print(f"{side:>22}: {speed:>12,.0f} bytes/s{ratio}")
    ratios = {f"ratio_{side.replace(', ', '_')}": round(speeds["job"] / speed, 3) for side, speed in speeds.items()}
    del ratios["ratio_job"]
    figures = {side.replace(", ", "_"): round(speed) for side, speed in speeds.items()}
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    settings = {**task.scorer.settings, "parameters": parameters, "threads": torch.get_num_threads(), "clock": clock}
    print(
        json.dumps({"bench": "entropies", "text": name, "bytes": size, "unit": "bytes/s"} | figures | ratios | settings)
    )


if __name__ == "__main__":
    main()
