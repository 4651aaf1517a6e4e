"""Parameter groups and the learning rate."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from blt_model import BLT, ByteLM, ByteLMConfig, preset
from blt_train.config import ScheduleConfig
from blt_train.optim import learning_rate, parameter_groups


@pytest.mark.parametrize("name", ["entropy-debug", "blt-debug"])
def test_every_parameter_is_in_one_group(name: str) -> None:
    config = preset(name)
    model: nn.Module = ByteLM(config) if isinstance(config, ByteLMConfig) else BLT(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ([names[id(item)] for item in group["params"]] for group in parameter_groups(model, 0.1))  # type: ignore[attr-defined]  # a list
    assert sorted([*decayed, *others]) == sorted(names.values())
    assert not [name for name in decayed if "norm" in name or "embedding" in name or "bias" in name]
    assert all("norm" in name or "embedding" in name or "bias" in name for name in others)
    assert decayed
    assert others


def test_warm_up_then_cosine() -> None:
    schedule = ScheduleConfig(total_steps=110, warmup_steps=10, min_lr_fraction=0.1)
    rates = [learning_rate(step, 2.0, schedule) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[59] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[-1] == pytest.approx(0.2)
    assert all(before > after for before, after in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize("warmup", [0, 5, 9])
def test_schedule_edges(warmup: int) -> None:
    schedule = ScheduleConfig(total_steps=5, warmup_steps=warmup, min_lr_fraction=0.0)
    rates = [learning_rate(step, 1.0, schedule) for step in range(1, 6)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert (rates[-1] == 0) == (warmup == 0)
