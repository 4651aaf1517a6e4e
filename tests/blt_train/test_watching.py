"""What a run tells while it trains: by source, samples, traces, dashboards; and that resuming leaves no seam."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.blt_train.samples import (
    blt_config,
    byte_config,
    run_command,
    table_of,
    text_documents,
    without_times,
    write_documents,
    write_patched,
)

from blt_data import frame
from blt_model import SamplingOptions, next_byte_entropy, pack_documents
from blt_model.weights.native import load_model, model_fingerprint, save_model
from blt_patcher import EntropyScheme
from blt_train import ConfigError, TrainConfig, evaluate, generate, read_metrics, train
from blt_train.evaluation import evaluate_holdouts
from blt_train.inputs import architecture_of_config
from blt_train.metrics import Metrics, StepMetrics
from blt_train.parallel.seeding import fresh_model
from blt_train.runtime import Runtime
from blt_train.samples import read_samples
from blt_train.trace_table import costs_on_cpu, costs_on_gpu, trace_table
from blt_train.training_samples import TEMPERATURE
from blt_train.update_norm import UpdateNorm

PROMPTS = "logging.samples=['the cat ', 'été']"


class StopAfter:
    """Ends a launch after a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, metrics: Metrics) -> None:
        if isinstance(metrics, StepMetrics) and metrics.step == self._step:
            raise InterruptedError("stopped by the test")


def launch_until(step: int, config: TrainConfig) -> None:
    with pytest.raises(InterruptedError):
        train(config, on_progress=StopAfter(step))


def test_update_norm_is_that_of_the_change() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    measured = UpdateNorm(model.parameters(), Runtime(device=torch.device("cpu")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    change = [parameter.detach() - old for parameter, old in zip(model.parameters(), before, strict=True)]
    assert measured.norm() == pytest.approx(math.sqrt(sum(float(part.square().sum()) for part in change)))


def test_step_metrics_add_up(workplace: Path) -> None:
    result = train(blt_config(workplace, "run", "schedule.total_steps=3"))
    for step in result.steps:
        assert step.flops == pytest.approx(step.flops_per_second_per_rank * step.seconds)
        assert step.bytes_per_second_per_rank == pytest.approx(step.bytes_per_second)
        assert step.patches_per_second_per_rank == pytest.approx(step.patches_per_second)
        assert step.update_norm is not None
        assert step.update_norm > 0
        # No source but one, and a CPU.
        assert (step.sources, step.mfu, step.memory_reserved_bytes) == (None, None, None)
    off = train(blt_config(workplace, "off", "schedule.total_steps=3", "logging.update_norm=false"))
    assert [step.update_norm for step in off.steps] == [None] * 3
    assert [step.loss for step in off.steps] == [step.loss for step in result.steps]


def test_evaluation_by_source_is_that_of_each_alone(workplace: Path) -> None:
    documents = text_documents(24, seed=7)
    names = ["wiki" if index % 3 else "web" for index in range(len(documents))]
    write_documents(workplace / "mixed", documents, sources=names)
    for name in ("web", "wiki"):
        alone = [document for document, source in zip(documents, names, strict=True) if source == name]
        write_documents(workplace / name, alone)
    holdout = f"data.holdout={workplace / 'mixed'}"
    result = train(byte_config(workplace, "run", holdout, "schedule.total_steps=2"))
    mixed = evaluate(workplace / "run", workplace / "mixed", device="cpu")
    assert set(mixed.by_source) == {"web", "wiki"}
    for name in ("web", "wiki"):
        alone_figures = evaluate(workplace / "run", workplace / name, device="cpu")
        assert alone_figures.by_source == {}
        tally = mixed.by_source[name]
        assert tally.nll == pytest.approx(alone_figures.nll, rel=1e-6)
        counts = (alone_figures.targets, alone_figures.bytes, alone_figures.documents)
        assert (tally.targets, tally.bytes, tally.documents) == counts
    # The last evaluation of training is the same, to the bit.
    assert result.evaluations[-1].holdout_bpb_by_source == mixed.bpb_by_source
    assert result.evaluations[-1].holdout_bpb == mixed.bpb
    printed = run_command(
        "evaluate", "--checkpoint", str(workplace / "run"), "--data", str(workplace / "mixed"), "--device", "cpu"
    )
    assert "By source" in printed.stdout
    assert f"{mixed.by_source['web'].bpb:.4f}" in printed.stdout


def test_several_holdouts_are_added_up(workplace: Path) -> None:
    model = fresh_model(architecture_of_config(byte_config(workplace, "any")), 0)
    tables = {"a": table_of(workplace / "bytes-holdout"), "b": table_of(workplace / "bytes")}
    runtime = Runtime(device=torch.device("cpu"))
    both = evaluate_holdouts(model, tables, sequence_tokens=256, runtime=runtime)
    each = [
        evaluate_holdouts(model, {name: table}, sequence_tokens=256, runtime=runtime) for name, table in tables.items()
    ]
    assert both.nll == pytest.approx(sum(result.nll for result in each))
    assert both.bytes == sum(result.bytes for result in each)
    assert both.bpb_by_source == {name: result.bpb for name, result in zip(tables, each, strict=True)}
    assert model.training


def test_a_mixture_tells_its_shares_and_its_sources(workplace: Path) -> None:
    sources = {
        "long": {"train": str(workplace / "bytes"), "holdout": str(workplace / "bytes-holdout"), "weight": 3.0},
        "short": {"train": str(workplace / "bytes-holdout"), "holdout": str(workplace / "bytes"), "weight": 1.0},
    }
    config = byte_config(
        workplace, "run", "data.train=null", f"data.sources={json.dumps(sources)}", "schedule.total_steps=4"
    )
    result = train(config)
    for step in result.steps:
        assert step.sources is not None
        assert set(step.sources) == {"long", "short"}
        assert sum(step.sources.values()) == pytest.approx(1)
    for evaluation in result.evaluations:
        assert evaluation.holdout_bpb_by_source is not None
        assert set(evaluation.holdout_bpb_by_source) == {"long", "short"}


def test_samples_are_what_generate_writes(workplace: Path) -> None:
    overrides = ["schedule.total_steps=4", "logging.sample_every=2", "logging.sample_bytes=24", PROMPTS]
    train(byte_config(workplace, "run", *overrides))
    samples = read_samples(workplace / "run")
    assert [(sample.step, sample.index) for sample in samples] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    for sample in samples[2:]:
        sampling = SamplingOptions(temperature=TEMPERATURE, seed=sample.index)
        text = bytes(
            generate(workplace / "run", sample.prompt.encode(), max_new_bytes=24, sampling=sampling, device="cpu")
        )
        exact = sample.completion.encode() if sample.completion_hex is None else bytes.fromhex(sample.completion_hex)
        assert exact == text
    assert {sample.prompt for sample in samples} == {"the cat ", "été"}


def test_a_resumed_run_tells_what_an_undisturbed_one_does(workplace: Path) -> None:
    overrides = [
        "schedule.total_steps=9", "checkpoint.every=3", "evaluation.every=2", "logging.tensorboard=true",
        "logging.sample_bytes=8", PROMPTS, f"data.holdout={workplace / 'patched-holdout'}",
    ]  # fmt: skip
    whole, parts = (blt_config(workplace, name, *overrides) for name in ("whole", "parts"))
    train(whole)
    launch_until(5, parts)
    launch_until(8, parts)
    train(parts)
    told = [[without_times(part) for part in read_metrics(workplace / name)] for name in ("parts", "whole")]
    assert told[0] == told[1]
    lines = [(workplace / name / "samples.jsonl").read_bytes() for name in ("parts", "whole")]
    assert lines[0] == lines[1]
    assert lines[0].count(b"\n") == 2 * 6  # steps 0, 2, 4, 6, 8 and 9
    boards = [EventAccumulator(str(workplace / name / "tensorboard")).Reload() for name in ("parts", "whole")]
    for tag in ("train/loss", "holdout/bpb"):
        shown = [[(event.step, event.value) for event in board.Scalars(tag)] for board in boards]
        assert shown[0] == shown[1]
    assert boards[0].Tags() == boards[1].Tags()


def test_training_does_not_depend_on_what_it_tells(workplace: Path) -> None:
    quiet = train(byte_config(workplace, "quiet", "schedule.total_steps=5"))
    loud = train(
        byte_config(
            workplace, "loud", "schedule.total_steps=5", "logging.tensorboard=true", "logging.sample_every=1",
            "logging.profile_step=2", PROMPTS,
        )
    )  # fmt: skip
    assert [step.loss for step in loud.steps] == [step.loss for step in quiet.steps]
    prints = [model_fingerprint(load_model(result.checkpoint)) for result in (quiet, loud)]
    assert prints[0] == prints[1]


def test_samples_of_a_blt_need_its_entropy_model(workplace: Path) -> None:
    scorer = fresh_model(architecture_of_config(byte_config(workplace, "any")), 0).eval()
    save_model(scorer, workplace / "scorer")
    documents = text_documents(30)
    with torch.no_grad():
        entropies = [
            next_byte_entropy(scorer(pack_documents([np.append(frame(content), 0)])[0])).numpy().astype("float16")
            for content in documents
        ]
    write_patched(
        workplace / "scored",
        documents,
        EntropyScheme(threshold=float(entropies[0].mean())),
        entropies=entropies,
        entropy_fingerprint=model_fingerprint(scorer),
    )
    overrides = [f"data.train={workplace / 'scored'}", "schedule.total_steps=2", "logging.sample_bytes=8", PROMPTS]
    with pytest.raises(ConfigError, match=r"logging\.samples needs the entropy model that made the patches"):
        train(blt_config(workplace, "run", *overrides))
    train(blt_config(workplace, "run", *overrides, f"entropy_model={workplace / 'scorer'}"))
    assert [sample.step for sample in read_samples(workplace / "run")] == [0, 0, 2, 2]


def test_profiles_are_chrome_traces(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = byte_config(
        workplace, "run", "schedule.total_steps=4", "logging.profile_step=2", "logging.profile_steps=2"
    )
    train(config)
    folder = workplace / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "steps-00000002-00000003-rank-00000.json.gz",
        "steps-00000002-00000003.txt",
    ]
    with gzip.open(folder / "steps-00000002-00000003-rank-00000.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert "aten::mm" in names or "aten::addmm" in names
    assert any("AdamW" in str(name) for name in names)
    table = (folder / "steps-00000002-00000003.txt").read_text(encoding="utf-8")
    assert "operators on the CPU" in table
    assert "aten::" in table
    assert "GPU kernels" not in table
    assert table in capfd.readouterr().err


def test_the_table_of_a_trace_counts_nested_calls_once() -> None:
    def event(name: str, start: float, duration: float, category: str = "cpu_op", thread: int = 1) -> dict[str, object]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": thread}

    events = [
        event("inner", 2, 3),
        event("outer", 0, 10),
        event("outer", 20, 5),
        event("innermost", 3, 1),
        event("inner", 20, 4),  # begins with its caller
        event("outer", 4, 7, thread=2),
        event("mm", 0, 4, "kernel"),
        event("mm", 9, 6, "kernel"),
        {"ph": "i", "cat": "cpu_op", "name": "no duration", "ts": 0},
    ]
    found = {name: (cost.calls, cost.microseconds) for name, cost in costs_on_cpu(events).items()}
    assert found == {"outer": (3, 15), "inner": (2, 6), "innermost": (1, 1)}
    assert {name: (cost.calls, cost.microseconds) for name, cost in costs_on_gpu(events).items()} == {"mm": (2, 10)}
    table = trace_table(events)
    assert table.index("GPU kernels and copies: 0.0 ms") < table.index("operators on the CPU")


def test_a_profile_of_the_last_step_or_beyond_the_end(workplace: Path) -> None:
    train(byte_config(workplace, "run", "schedule.total_steps=3", "logging.profile_step=3", "logging.profile_steps=9"))
    assert (workplace / "run" / "profile" / "steps-00000003-00000003-rank-00000.json.gz").exists()
    train(byte_config(workplace, "none", "schedule.total_steps=3", "logging.profile_step=4"))
    assert not (workplace / "none" / "profile").exists()


def test_memory_snapshots_are_cuda_only(workplace: Path) -> None:
    config = byte_config(workplace, "run", "device=cpu", "logging.profile_step=1", "logging.memory_snapshot=true")
    with pytest.raises(ConfigError, match=r"records CUDA allocations, and this run is on the CPU: set logging\.memory"):
        train(config)
    assert not (workplace / "run").exists()
    with pytest.raises(ConfigError, match=r"name the first with logging\.profile_step"):
        byte_config(workplace, "run", "logging.memory_snapshot=true")


def test_two_processes_evaluate_sample_and_trace(workplace: Path) -> None:
    overrides = [
        "schedule.total_steps=3", "batch.sequences_per_micro_batch=1", "logging.sample_bytes=12", PROMPTS,
        "logging.profile_step=2", f"data.holdout={workplace / 'patched-holdout'}", "precision=float32",
    ]  # fmt: skip
    alone = train(blt_config(workplace, "alone", *overrides))
    arguments = ["launch", "debug-blt", f"run={workplace / 'two'}", f"data.train={workplace / 'patched'}", *overrides]
    done = run_command(*arguments, "--nproc-per-node", "2")
    assert done.returncode == 0, done.stderr
    steps, evaluations = read_metrics(workplace / "two")
    for mine, other in zip(steps, alone.steps, strict=True):
        assert mine.flops == other.flops
        assert mine.update_norm == pytest.approx(other.update_norm, rel=1e-3)
        assert mine.bytes_per_second == pytest.approx(2 * mine.bytes_per_second_per_rank)
    for held_out, other_held_out in zip(evaluations, alone.evaluations, strict=True):
        assert held_out.holdout_bpb == pytest.approx(other_held_out.holdout_bpb, rel=1e-3)
    # Sharded weights, gathered, begin as those of one process.
    first, others = (
        [sample for sample in read_samples(workplace / name) if sample.step == 0] for name in ("two", "alone")
    )
    assert first == others
    assert len(read_samples(workplace / "two")) == 4
    traces = sorted(path.name[-18:] for path in (workplace / "two" / "profile").glob("*.json.gz"))
    assert traces == ["rank-00000.json.gz", "rank-00001.json.gz"]
