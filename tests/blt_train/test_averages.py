"""Averaged weights of a run: kept exactly, evaluated, exported, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.blt_train.samples import blt_config

from blt_model.weights.native import load_model
from blt_train import CheckpointError, evaluate, train
from blt_train.exchange import export_model


def test_averaged_weights_are_evaluated_and_exported(workplace: Path, tmp_path: Path) -> None:
    """`--ema` takes the average, which equals one made of the run's own weights step by step."""
    overrides = ["schedule.total_steps=3", "checkpoint.every=1", "checkpoint.keep_last=4", "optimizer.ema_decay=0.4"]
    result = train(blt_config(workplace, "averaged", *overrides))
    checkpoints = sorted((result.run / "checkpoints").glob("step-*"))
    weights = [dict(load_model(path).named_parameters()) for path in checkpoints]
    # The average begins with the first weights, which no checkpoint has: reckon on from the first checkpoint's.
    average = load_file(checkpoints[0] / "ema.safetensors")
    for step, after in enumerate(weights[1:], start=2):
        kept = min(0.4, (1 + step) / (10 + step))
        average = {name: kept * value + (1 - kept) * after[name].detach() for name, value in average.items()}
    last = export_model(result.run, tmp_path / "exported-last").model
    averaged = export_model(result.run, tmp_path / "exported-averaged", averaged=True).model
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter.detach(), average[name])
    assert any(not torch.equal(a, b) for a, b in zip(last.parameters(), averaged.parameters(), strict=True))
    data = workplace / "patched-holdout"
    plain, other = (evaluate(result.run, data, averaged=averaged).bpb for averaged in (False, True))
    assert plain != other
    assert evaluate(tmp_path / "exported-averaged", data, sequence_tokens=256).bpb == pytest.approx(other, rel=1e-6)


def test_averages_that_are_not_there(workplace: Path, tmp_path: Path) -> None:
    result = train(blt_config(workplace, "plain", "schedule.total_steps=1"))
    with pytest.raises(CheckpointError, match=r"holds no averaged weights, as optimizer\.ema_decay was not set"):
        evaluate(result.run, workplace / "patched-holdout", averaged=True)
    exported = tmp_path / "exported"
    export_model(result.run, exported)
    with pytest.raises(CheckpointError, match="is no run or checkpoint"):
        export_model(exported, tmp_path / "again", averaged=True)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_stopped_run_ends_with_the_bits_of_an_undisturbed_one(name: str, workplace: Path) -> None:
    """Weights, optimizer and averages; with z-loss and a schedule that has begun to decay."""
    overrides = [
        f"optimizer.name={name}",
        "optimizer.ema_decay=0.9",
        "optimizer.z_loss=1e-3",
        "schedule.kind=wsd",
        "schedule.total_steps=6",
        "schedule.warmup_steps=1",
        "schedule.decay_fraction=0.5",
        "checkpoint.every=2",
    ]
    whole = train(blt_config(workplace, "whole", *overrides))
    stopped = train(blt_config(workplace, "stopped", *overrides))
    latest = stopped.run / "latest"
    latest.unlink()
    latest.symlink_to("checkpoints/step-00000004")
    resumed = train(blt_config(workplace, "stopped", *overrides))
    assert resumed.is_finished
    for section in ("model", "optimizer", "ema"):
        expected, found = (load_file(run.run / "latest" / f"{section}.safetensors") for run in (whole, resumed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), section
    assert [step.loss for step in resumed.steps] == [step.loss for step in whole.steps]
    moments = {key.partition(".")[0] for key in load_file(whole.run / "latest" / "optimizer.safetensors")}
    assert moments == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if name == "muon" else set())
