"""Parameter groups, optimizers, the average of the weights, and the learning rate."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blt_model import BLT, ByteLM, ByteLMConfig, preset
from blt_train.config import OptimizerConfig, OptimizerName, ScheduleConfig, ScheduleKind
from blt_train.optim import Role, WeightAverage, learning_rate, make_optimizer, parameter_groups
from blt_train.optim.muon import orthogonalize


def model_of(name: str) -> nn.Module:
    config = preset(name)
    torch.manual_seed(0)
    return ByteLM(config) if isinstance(config, ByteLMConfig) else BLT(config)


def filled(model: nn.Module, seed: int) -> None:
    """Give every parameter a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["entropy-debug", "blt-debug"])
def test_every_parameter_is_in_one_group(name: str) -> None:
    model = model_of(name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    config = OptimizerConfig(weight_decay=0.3, embedding_weight_decay=0.02)
    groups = parameter_groups(model, config)
    found: dict[str, list[str]] = {
        str(group["role"]): [names[id(item)] for item in group["params"]]  # type: ignore[attr-defined]  # a list
        for group in groups
    }
    assert sorted(itertools.chain(*found.values())) == sorted(names.values())
    assert all("norm" in name for name in found["vector"])
    assert all("embedding" in name for name in found["embedding"])
    assert len(found["head"]) == 1
    assert not [name for name in found["matrix"] if "norm" in name or "embedding" in name or "head" in name]
    decays = {group["role"]: group["weight_decay"] for group in groups}
    assert decays == {Role.MATRIX: 0.3, Role.HEAD: 0.3, Role.EMBEDDING: 0.02, Role.VECTOR: 0.0}


def test_sections_are_the_matrices_that_share_a_parameter() -> None:
    model = BLT(preset("blt-debug", latent={"num_kv_heads": 2}))  # type: ignore[arg-type]  # a BLT's preset
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (matrices,) = (g for g in parameter_groups(model, OptimizerConfig()) if g["role"] is Role.MATRIX)
    sections = {
        names[id(item)]: rows
        for item, rows in zip(matrices["params"], matrices["sections"], strict=True)  # type: ignore[call-overload]  # lists
    }
    assert sections["latent.blocks.0.attention.query_key_value.weight"] == (64, 32, 32)
    assert sections["latent.blocks.0.feed_forward.gate_value.weight"] == (192, 192)
    assert sections["decoder.cross_attention.0.key_value.weight"] == (32, 32)
    assert sections["latent.blocks.0.attention.output.weight"] == (64,)


def test_every_role_decays_as_told() -> None:
    """Without gradients AdamW and Muon only decay."""
    for name in OptimizerName:
        config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5, embedding_weight_decay=0.25)
        model = model_of("blt-debug")
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        make_optimizer(model, config).step()
        for key, value in model.named_parameters():
            factor = 1.0 if "norm" in key else 1 - 0.1 * (0.25 if "embedding" in key else 0.5)
            torch.testing.assert_close(value, before[key] * factor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
def test_orthogonalize_keeps_directions_and_evens_out_their_lengths(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left @ torch.diag(torch.linspace(0.1, 3, min(shape))) @ right
    result = orthogonalize(matrix, 5)
    assert result.dtype == torch.bfloat16
    inner = left.mT @ result.float() @ right.mT
    values = inner.diagonal()
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (inner - torch.diag(values)).abs().max() < 0.05


def test_muon_is_torchs_on_every_matrix_and_adamw_elsewhere() -> None:
    """Three steps against torch's own Muon on the matrices that our parameters are made of, and against its AdamW."""
    config = OptimizerConfig(name=OptimizerName.MUON, learning_rate=0.01, weight_decay=0.1)
    ours, theirs = model_of("blt-debug"), model_of("blt-debug")
    optimizer = make_optimizer(ours, config)
    groups = parameter_groups(theirs, config)
    (matrices,) = (group for group in groups if group["role"] is Role.MATRIX)
    split: list[list[nn.Parameter]] = []
    for parameter, rows in zip(matrices["params"], matrices["sections"], strict=True):  # type: ignore[call-overload]  # lists
        split.append([nn.Parameter(part.detach().clone()) for part in parameter.split(list(rows))])
    reference = torch.optim.Muon(
        list(itertools.chain(*split)), lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    others = [group for group in groups if group["role"] is not Role.MATRIX]
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for seed in range(3):
        filled(ours, seed)
        filled(theirs, seed)
        for parameter, parts, rows in zip(matrices["params"], split, matrices["sections"], strict=True):  # type: ignore[call-overload]  # lists
            for part, gradient in zip(parts, parameter.grad.split(list(rows)), strict=True):
                part.grad = gradient.clone()
        optimizer.step()
        reference.step()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        adamw.step()
    plain = dict(theirs.named_parameters())
    merged = {id(parameter): torch.cat(parts) for parameter, parts in zip(matrices["params"], split, strict=True)}  # type: ignore[call-overload]  # lists
    for name, parameter in ours.named_parameters():
        expected = merged.get(id(plain[name]))
        if expected is None:
            assert torch.equal(parameter, plain[name]), name
        else:
            # Both iterate in bfloat16, whose rounding is all that differs: a hundredth of three updates of 0.002.
            difference = (parameter - expected).abs()
            assert difference.max() < 1e-3, name
            assert difference.mean() < 1e-4, name


@pytest.mark.parametrize("name", OptimizerName)
def test_a_loaded_optimizer_goes_on_to_the_bit(name: OptimizerName) -> None:
    config = OptimizerConfig(name=name)
    model, copy = model_of("blt-debug"), model_of("blt-debug")
    optimizer = make_optimizer(model, config)
    for seed in range(2):
        filled(model, seed)
        optimizer.step()
    copy.load_state_dict(model.state_dict())
    resumed = make_optimizer(copy, config)
    state = {i: optimizer.state[p] for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    assert all(isinstance(value, Tensor) for moments in state.values() for value in moments.values())
    cloned = {i: {key: value.clone() for key, value in moments.items()} for i, moments in state.items()}
    resumed.load_state_dict({"state": cloned, "param_groups": resumed.state_dict()["param_groups"]})
    for seed in range(2, 4):
        for both, each in ((model, optimizer), (copy, resumed)):
            filled(both, seed)
            each.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_average_of_weights() -> None:
    model = nn.Linear(3, 2, bias=False)
    weights = [torch.full((2, 3), float(value)) for value in (0, 1, 5, 2)]
    with torch.no_grad():
        model.weight.copy_(weights[0])
    average = WeightAverage(model, 0.3)
    expected = weights[0]
    for step, weight in enumerate(weights[1:], start=1):
        with torch.no_grad():
            model.weight.copy_(weight)
        average.update(step)
        kept = min(0.3, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight
    torch.testing.assert_close(average.tensors["weight"], expected)
    assert torch.equal(model.weight, weights[-1])
    resumed = WeightAverage(model, 0.3)
    resumed.load(average.tensors)
    for each in (average, resumed):
        each.update(4)
    assert torch.equal(average.tensors["weight"], resumed.tensors["weight"])
    with pytest.raises(ValueError, match="another model"):
        average.load({"weight": torch.zeros(2, 2)})


def test_warm_up_then_cosine() -> None:
    schedule = ScheduleConfig(total_steps=110, warmup_steps=10, min_lr_fraction=0.1)
    rates = [learning_rate(step, 2.0, schedule) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[59] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[-1] == pytest.approx(0.2)
    assert all(before > after for before, after in itertools.pairwise(rates[9:]))


def test_warm_up_then_stable_then_linear() -> None:
    schedule = ScheduleConfig(
        kind=ScheduleKind.WSD, total_steps=100, warmup_steps=10, decay_fraction=0.25, min_lr_fraction=0.1
    )
    rates = [learning_rate(step, 2.0, schedule) for step in range(1, 101)]
    assert rates[9:75] == [2.0] * 66
    assert rates[75:] == pytest.approx([2.0 - 1.8 * step / 25 for step in range(1, 26)])


def test_warm_up_then_constant() -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.CONSTANT, total_steps=20, warmup_steps=4)
    rates = [learning_rate(step, 2.0, schedule) for step in range(1, 21)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, *[2.0] * 17])


@pytest.mark.parametrize("kind", ScheduleKind)
@pytest.mark.parametrize("warmup", [0, 4, 5, 9])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_schedule_edges(kind: ScheduleKind, warmup: int, fraction: float) -> None:
    schedule = ScheduleConfig(
        kind=kind, total_steps=5, warmup_steps=warmup, decay_fraction=fraction, min_lr_fraction=0.0
    )
    rates = [learning_rate(step, 1.0, schedule) for step in range(1, 6)]
    assert all(0 <= rate <= 1 for rate in rates)
    falls = warmup < 5 and (kind is ScheduleKind.COSINE or (kind is ScheduleKind.WSD and fraction > 0))
    assert (rates[-1] == 0) == falls


def test_sharded_parameters_move_as_whole_ones(repository: Path) -> None:
    """Four processes, rows that do not divide, and copies of shards: the same bits for both optimizers."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.blt_train.sharded_optimizers"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("agree")]
    assert lines == [f"agree {mesh} {name}" for mesh in ("sharded", "replicated") for name in OptimizerName]
