"""Training in this process: it learns, counts right, and stops where it must."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tests.blt_train.samples import blt_config, byte_config, text_documents, write_documents, write_patched

from blt_data import InputError, ShardDirectory, frame
from blt_model import pack_documents
from blt_model.loss import cross_entropy_and_z_sum
from blt_model.weights.native import load_model, model_fingerprint, save_model
from blt_train import (
    CheckpointError,
    ConfigError,
    EvaluationMetrics,
    StepMetrics,
    TrainConfig,
    TrainingError,
    evaluate,
    read_metrics,
    step,
    train,
    trainer,
)
from blt_train.checkpoint import RunDirectory, read_trainer_state
from blt_train.cli import main
from blt_train.errors import EXIT_SIGTERM
from blt_train.evaluation import Evaluation
from blt_train.inputs import architecture_of_config
from blt_train.metrics import Metrics
from blt_train.parallel.seeding import fresh_model


def holdout_of(config_name: str, root: Path) -> str:
    return f"data.holdout={root / config_name}-holdout"


def test_byte_lm_learns(workplace: Path) -> None:
    seen: list[Metrics] = []
    config = byte_config(workplace, "run", holdout_of("bytes", workplace), "schedule.total_steps=40")
    result = train(config, on_progress=seen.append)
    assert (result.step, result.is_finished) == (40, True)
    assert [metrics.step for metrics in result.steps] == list(range(1, 41))
    assert [metrics.step for metrics in result.evaluations] == [0, 10, 20, 30, 40]
    assert result.evaluations[-1].holdout_bpb < result.evaluations[0].holdout_bpb - 2
    assert tuple(item for item in seen if isinstance(item, StepMetrics)) == result.steps
    assert tuple(item for item in seen if isinstance(item, EvaluationMetrics)) == result.evaluations
    assert read_metrics(workplace / "run") == (result.steps, result.evaluations)
    assert result.checkpoint == (workplace / "run" / "latest").resolve()
    assert len(list((workplace / "run" / "checkpoints").iterdir())) == config.checkpoint.keep_last


def test_blt_learns_and_reports_patches(workplace: Path) -> None:
    config = blt_config(workplace, "run", holdout_of("patched", workplace), "schedule.total_steps=30")
    result = train(config)
    assert result.evaluations[-1].holdout_bpb < result.evaluations[0].holdout_bpb - 1.5
    for metrics in result.steps:
        assert metrics.patches > 0
        assert metrics.mean_patch_length == metrics.targets / metrics.patches
        assert 0.5 < metrics.utilisation <= 1
        assert metrics.bpb == pytest.approx(metrics.loss * metrics.targets / metrics.bytes / math.log(2))


def test_an_epoch_counts_every_byte(workplace: Path) -> None:
    shards = ShardDirectory.open(workplace / "bytes")
    result = train(byte_config(workplace, "run", "schedule.total_steps=30"))
    first_epoch = [metrics for metrics in result.steps if metrics.epoch <= 1]
    assert len(first_epoch) < 30
    after = result.steps[len(first_epoch)]
    total = sum(metrics.bytes for metrics in first_epoch)
    assert total <= shards.manifest.bytes <= total + after.bytes


@pytest.mark.parametrize("kind", ["bytes", "patched"])
def test_micro_batches_do_not_change_the_result(kind: str, workplace: Path) -> None:
    make = byte_config if kind == "bytes" else blt_config
    results = [
        train(make(workplace, f"run{size}", "schedule.total_steps=6", f"batch.sequences_per_micro_batch={size}"))
        for size in (1, 4)
    ]
    losses = [[metrics.loss for metrics in result.steps] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluation_equals_document_by_document(workplace: Path) -> None:
    result = train(byte_config(workplace, "run", "schedule.total_steps=3"))
    model = load_model(result.checkpoint)
    nll, targets = 0.0, 0
    for shard_index, row in (shards := ShardDirectory.open(workplace / "bytes-holdout")).documents():
        batch, wanted = pack_documents([frame(shards.shard(shard_index).content(row))])
        with torch.no_grad():
            nll += torch.nn.functional.cross_entropy(model(batch).double(), wanted, reduction="sum").item()
        targets += wanted.numel()
    figures = evaluate(workplace / "run", workplace / "bytes-holdout", sequence_tokens=4096, device="cpu")
    assert figures.nll == pytest.approx(nll, rel=1e-5)
    assert (figures.targets, figures.bytes) == (targets, shards.manifest.bytes)
    assert figures.bpb == pytest.approx(nll / math.log(2) / shards.manifest.bytes, rel=1e-5)


def test_evaluation_does_not_depend_on_the_batch(workplace: Path) -> None:
    train(blt_config(workplace, "run", "schedule.total_steps=2"))
    figures = [
        evaluate(workplace / "run", workplace / "patched-holdout", sequences_per_batch=size, device="cpu")
        for size in (1, 5)
    ]
    assert figures[0].nll == pytest.approx(figures[1].nll, rel=1e-6)
    assert figures[0].targets == figures[1].targets


def test_evaluation_of_the_first_bytes(workplace: Path) -> None:
    train(byte_config(workplace, "run", "schedule.total_steps=1"))
    sizes = [
        evaluate(workplace / "run", workplace / "bytes-holdout", max_bytes=limit, device="cpu")
        for limit in (1, 600, 10**9)
    ]
    assert sizes[0].bytes > 0
    assert sizes[0].bytes <= sizes[1].bytes <= 600 or sizes[1].documents == 1
    assert sizes[2].bytes == ShardDirectory.open(workplace / "bytes-holdout").manifest.bytes


def test_nothing_to_evaluate_on(workplace: Path) -> None:
    train(byte_config(workplace, "run", "schedule.total_steps=1"))
    write_documents(workplace / "empty", [b"", b""])
    with pytest.raises(ConfigError, match="holds no byte to evaluate on"):
        evaluate(workplace / "run", workplace / "empty", device="cpu")


def test_bfloat16_trains_too(workplace: Path) -> None:
    config = blt_config(workplace, "run", "schedule.total_steps=6", "precision=bfloat16")
    result = train(config)
    assert result.steps[-1].loss < result.steps[0].loss
    weights = load_file(result.checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_equal_seeds_give_equal_weights(workplace: Path) -> None:
    architecture = architecture_of_config(byte_config(workplace, "run"))
    prints = [model_fingerprint(fresh_model(architecture, seed)) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_losses_that_are_not_finite_stop_the_run(workplace: Path) -> None:
    overrides = ["optimizer.learning_rate=1e30", "schedule.warmup_steps=0", "optimizer.weight_decay=0"]
    broken = byte_config(workplace, "run", *overrides, "optimizer.max_nonfinite_steps=3", "checkpoint.every=20")
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row, .* step \d+, .*learning_rate") as caught:
        train(broken)
    assert "there is no checkpoint yet" in str(caught.value)
    steps, _ = read_metrics(workplace / "run")
    assert math.isfinite(steps[0].loss)
    assert [item.nonfinite_steps for item in steps][-2:] == [1, 2]
    assert all(math.isfinite(item.loss) or item.nonfinite_steps for item in steps)
    # Weights that one step made infinite are not saved, though its loss was sound.
    overrides[0] = "optimizer.learning_rate=1e39"
    with pytest.raises(CheckpointError, match=r"checkpoint of step 1 could not be written .* is no longer finite"):
        train(byte_config(workplace, "other", *overrides, "checkpoint.every=1"))
    assert not (workplace / "other" / "latest").exists()
    assert not list((workplace / "other" / "checkpoints").iterdir())


class BrokenSteps:
    """The loss of training with some steps' made infinite; asks this process to stop in one of them."""

    def __init__(self, broken: tuple[int, ...], micro_batches: int, *, first: int = 1, stop_at: int = 0) -> None:
        self._original = cross_entropy_and_z_sum
        self._broken, self._micro_batches, self._stop_at = broken, micro_batches, stop_at
        self._calls = (first - 1) * micro_batches

    def __call__(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, plain = self._original(*arguments)
        number, self._calls = self._calls // self._micro_batches + 1, self._calls + 1
        if number == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return (loss * math.inf, plain * math.inf) if number in self._broken else (loss, plain)


def test_a_step_that_is_not_finite_is_left_out(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["schedule.total_steps=6", "checkpoint.every=3", "optimizer.max_nonfinite_steps=2"]
    whole, part = (byte_config(workplace, name, *overrides) for name in ("whole", "part"))
    size = whole.batch.micro_batches(1)
    with monkeypatch.context() as patch:
        patch.setattr(step, "cross_entropy_and_z_sum", BrokenSteps((3, 5), size))
        result = train(whole)
    assert [item.nonfinite_steps for item in result.steps] == [0, 0, 1, 1, 2, 2]
    assert [math.isfinite(item.loss) for item in result.steps] == [True, True, False, True, False, True]
    # No checkpoint is pushed out by those of weights that may be beyond help.
    assert [path.name for path in (workplace / "whole" / "checkpoints").iterdir()] == ["step-00000006"]
    # Stopped in the step that is left out and gone on from there, the run ends the same, counters and all.
    with monkeypatch.context() as patch:
        patch.setattr(step, "cross_entropy_and_z_sum", BrokenSteps((3, 5), size, stop_at=3))
        stopped = train(part)
    assert (stopped.step, stopped.is_finished, stopped.exit_status) == (3, False, EXIT_SIGTERM)
    state = read_trainer_state(stopped.checkpoint)
    assert (state.step, state.nonfinite_steps, state.nonfinite_in_row) == (3, 1, 1)
    shutil.copytree(workplace / "part", workplace / "worse", symlinks=True)
    with monkeypatch.context() as patch:
        patch.setattr(step, "cross_entropy_and_z_sum", BrokenSteps((5,), size, first=4))
        resumed = train(part)
    assert (resumed.is_finished, resumed.exit_status) == (True, 0)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (resumed.checkpoint / name).read_bytes() == (result.checkpoint / name).read_bytes()
    assert [item.nonfinite_steps for item in resumed.steps] == [0, 0, 1, 1, 2, 2]
    # Two in a row, one before the stop and one after it, are too many.
    with monkeypatch.context() as patch:
        patch.setattr(step, "cross_entropy_and_z_sum", BrokenSteps((4,), size, first=4))
        with pytest.raises(TrainingError, match="not finite in 2 steps in a row, the last of them step 4"):
            train(byte_config(workplace, "worse", *overrides))


def test_a_finished_run_returns_at_once(workplace: Path) -> None:
    config = byte_config(workplace, "run", "schedule.total_steps=4")
    first, second = train(config), train(config)
    assert second == first
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(config, resume=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.overrides.transformer.num_layers=1", r"model: transformer\.num_layers = 2, the config says 1"),
        ("optimizer.learning_rate=0.5", r"optimizer\.learning_rate = 0\.003, the config says 0\.5"),
        ("schedule.total_steps=5", r"schedule\.total_steps = 4, the config says 5"),
        ("seed=1", r"seed = 0, the config says 1"),
        ("data.sequence_tokens=128", r"data\.sequence_\w+ = \d+, the config says \d+"),
        ("batch.sequences_per_step=2", r"batch\.sequences_per_step = 4, the config says 2"),
        ("precision=bfloat16", "precision = 'float32', the config says 'bfloat16'"),
    ],
)
def test_resuming_refuses_what_would_change_the_numbers(override: str, message: str, workplace: Path) -> None:
    train(byte_config(workplace, "run", "schedule.total_steps=4"))
    before = (workplace / "run" / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        train(byte_config(workplace, "run", "schedule.total_steps=4", override))
    assert (workplace / "run" / "config.yaml").read_text(encoding="utf-8") == before


def test_resuming_refuses_another_architecture_and_other_data(workplace: Path) -> None:
    train(byte_config(workplace, "run", "schedule.total_steps=4"))
    with pytest.raises(CheckpointError, match="architecture byte-lm, the config says blt"):
        train(blt_config(workplace, "run", "schedule.total_steps=4"))
    write_documents(workplace / "other", text_documents(20, seed=9))
    with pytest.raises(CheckpointError, match="was trained on other data"):
        train(byte_config(workplace, "run", "schedule.total_steps=4", f"data.train={workplace / 'other'}"))


def test_resuming_allows_what_leaves_the_numbers(workplace: Path, corpus: Path) -> None:
    config = byte_config(workplace, "run", "schedule.total_steps=4")
    train(config)
    moved = byte_config(
        workplace,
        "run",
        "schedule.total_steps=4",
        f"data.train={corpus / 'bytes'}",
        "batch.sequences_per_micro_batch=4",
        "checkpoint.keep_last=1",
        "evaluation.every=null",
        "data.prefetch=1",
    )
    assert train(moved).is_finished


def test_only_one_process_trains_in_a_run(workplace: Path) -> None:
    run = RunDirectory(workplace / "run")
    with (
        run.lock(),
        pytest.raises(CheckpointError, match="another process is training here"),
    ):
        train(byte_config(workplace, "run"))


def test_patches_and_bytes_are_not_mixed_up(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"patched.*needed is kind bytes"):
        train(byte_config(workplace, "run", f"data.train={workplace / 'patched'}"))
    with pytest.raises(InputError, match=r"bytes.*needed is kind patched"):
        train(blt_config(workplace, "run", f"data.train={workplace / 'bytes'}"))
    with pytest.raises(InputError, match="needed is kind patched"):
        train(blt_config(workplace, "run", f"data.holdout={workplace / 'bytes-holdout'}"))
    assert not (workplace / "run").exists()


def test_holdout_patched_by_another_rule(workplace: Path) -> None:
    from blt_patcher import StaticScheme

    write_patched(workplace / "static", text_documents(5), StaticScheme(patch_length=4))
    with pytest.raises(ConfigError, match="was patched with another scheme than"):
        train(blt_config(workplace, "run", f"data.holdout={workplace / 'static'}"))


def test_a_flipped_byte_is_found_before_the_first_step(workplace: Path) -> None:
    documents = text_documents(20)
    directory = write_documents(workplace / "flipped", documents)
    path = directory / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[content.index(documents[1][:20]) + 3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"shard-00001\.arrow"):
        train(byte_config(workplace, "run", f"data.train={directory}"))
    assert not (workplace / "run" / "latest").exists()


def test_entropy_model_is_checked_and_kept(workplace: Path) -> None:
    import numpy as np

    from blt_patcher import EntropyScheme

    architecture = architecture_of_config(byte_config(workplace, "run"))
    scorer, stranger = fresh_model(architecture, 0), fresh_model(architecture, 1)
    save_model(scorer, workplace / "scorer")
    save_model(stranger, workplace / "stranger")
    documents = text_documents(30)
    generator = np.random.default_rng(0)
    entropies = [generator.uniform(0, 4, len(content) + 2).astype(np.float16) for content in documents]
    fingerprint = model_fingerprint(scorer)
    write_patched(
        workplace / "scored",
        documents,
        EntropyScheme(threshold=3.0),
        entropies=entropies,
        entropy_fingerprint=fingerprint,
    )

    def config(*overrides: str) -> TrainConfig:
        return blt_config(workplace, "run", "schedule.total_steps=2", f"data.train={workplace / 'scored'}", *overrides)

    with pytest.raises(ConfigError, match=r"stranger: is not the entropy model that scored"):
        train(config(f"entropy_model={workplace / 'stranger'}"))
    with pytest.raises(ConfigError, match="without an entropy model: leave it out"):
        train(blt_config(workplace, "run", f"entropy_model={workplace / 'scorer'}"))
    result = train(config(f"entropy_model={workplace / 'scorer'}"))
    kept = load_model(workplace / "run" / "entropy-model")
    assert model_fingerprint(kept) == fingerprint == read_trainer_state(result.checkpoint).entropy_model


def test_trainer_state_is_plain_json(workplace: Path) -> None:
    result = train(byte_config(workplace, "run", "schedule.total_steps=1"))
    state = json.loads((result.checkpoint / "trainer.json").read_text(encoding="utf-8"))
    assert state["step"] == 1
    (source,) = state["data"]["sources"].values()
    assert source["fingerprint"] == ShardDirectory.open(workplace / "bytes").manifest.fingerprint()
    assert (state["format_version"], state["processes"], state["nonfinite_steps"]) == (2, 1, 0)
    assert state["config"]["model"]["preset"] == "entropy-debug"
    assert set(state["packages"]) >= {"blt-train", "blt-model", "torch"}
    for path in result.checkpoint.iterdir():
        assert path.suffix in {".json", ".safetensors"}


def test_a_run_whose_last_steps_were_not_finite_says_so(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["schedule.total_steps=4", f"run={workplace / 'run'}", f"data.train={workplace / 'bytes'}"]
    size = byte_config(workplace, "run").batch.micro_batches(1)
    monkeypatch.setattr(step, "cross_entropy_and_z_sum", BrokenSteps((1, 3, 4), size))
    done = CliRunner().invoke(main, ["launch", "debug-entropy", *overrides])
    assert done.exit_code == 0, done.output
    assert "warning: the last 2 steps were left out as not finite, so the weights are those of step 2\n" in done.stderr
    assert "3 steps skipped as not finite" in done.stdout
    assert re.search(r"last batch, bits per byte .* not finite", done.stdout)


def test_a_summary_of_evaluations_that_are_not_finite(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Evaluation(nll=math.nan, targets=9, bytes=8, documents=1, by_source={})
    monkeypatch.setattr(trainer, "evaluate_holdouts", lambda *_, **__: broken)
    given = [f"data.train={workplace / 'bytes'}", f"data.holdout={workplace / 'bytes-holdout'}"]
    for _ in range(2):  # a finished run is told again
        done = CliRunner().invoke(
            main, ["launch", "debug-entropy", *given, f"run={workplace / 'run'}", "schedule.total_steps=1"]
        )
        assert done.exit_code == 0, done.output
        assert re.search(r"held-out bits per byte, step 1 .* not finite", done.stdout)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_told(error: Exception, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(step, "cross_entropy_and_z_sum", fail)
    arguments = ["launch", "debug-entropy", f"run={workplace / 'run'}", f"data.train={workplace / 'bytes'}"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("error: the ")
    assert "lower batch.sequences_per_micro_batch or data.sequence_tokens" in sentence


def test_weights_that_are_not_finite_are_not_evaluated(workplace: Path) -> None:
    config = byte_config(workplace, "run")
    model = fresh_model(architecture_of_config(config), config.seed)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = math.nan
    save_model(model, workplace / "model")
    with pytest.raises(CheckpointError, match="holds weights that are not finite, the first in "):
        evaluate(workplace / "model", workplace / "bytes-holdout", device="cpu")
