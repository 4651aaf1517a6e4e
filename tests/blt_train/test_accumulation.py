"""Gradients that backward passes add to `.grad` by themselves, and clipping, against autograd's and torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.blt_train.parallel_ranks import micro_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blt_model import BLT, ByteLM, preset
from blt_model.layers import SwiGLU
from blt_model.loss import cross_entropy_sum
from blt_model.weightless import Linear
from blt_train.config import ActivationCheckpointing, BatchConfig, DataConfig, ModelConfig, TrainConfig
from blt_train.errors import ConfigError
from blt_train.parallel.accumulation import accumulate_in_place, begin_accumulation
from blt_train.parallel.building import empty_model
from blt_train.parallel.compilation import check_cpp_compiler, compile_blocks
from blt_train.parallel.gradients import clip_whole
from blt_train.parallel.recomputation import recompute_blocks
from blt_train.parallel.seeding import fresh_model

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TABLE = {"table_size": 61}


def gradients(model: BLT | ByteLM, *, half: bool, steps: int = 1) -> dict[str, Tensor]:
    """Gradients of the last of some steps of three micro batches each."""
    for step in range(steps):
        model.zero_grad(set_to_none=True)
        begin_accumulation(model)
        for index in range(3):
            batch, targets = micro_batch(step, 2 * index, 2, patched=isinstance(model, BLT))
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
                logits = model(batch.to(DEVICE))
            cross_entropy_sum(logits, targets.to(DEVICE)).backward()  # type: ignore[no-untyped-call]
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


def models(name: str, mode: ActivationCheckpointing) -> tuple[BLT | ByteLM, BLT | ByteLM]:
    """A model that leaves gradients to autograd, and the same that adds them up by itself."""
    architecture = preset(name, hash_embedding=TABLE) if name.startswith("blt") else preset(name)
    plain = fresh_model(architecture, seed=1).to(DEVICE)
    placed = copy.deepcopy(plain)
    for model in (plain, placed):
        recompute_blocks(model, mode)
    accumulate_in_place(placed, maps=True)
    return plain, placed


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert sorted(one) == sorted(other)
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("mode", ActivationCheckpointing)
@pytest.mark.parametrize("name", ["blt-debug", "entropy-debug"])
def test_gradients_are_those_of_autograd(name: str, mode: ActivationCheckpointing) -> None:
    plain, placed = models(name, mode)
    assert distance(gradients(placed, half=False, steps=2), gradients(plain, half=False, steps=2)) < 1e-5
    for module in placed.modules():
        if isinstance(module, Linear):
            assert module.weight.grad is module.gradient_sum


def test_gradients_in_half_precision_are_rounded_less() -> None:
    plain, placed = models("blt-debug", ActivationCheckpointing.NONE)
    layer, other = nn.Linear(24, 40, bias=False).to(DEVICE), Linear(24, 40).to(DEVICE)
    other.load_state_dict(layer.state_dict())
    accumulate_in_place(other, maps=True)
    begin_accumulation(other)
    exact = torch.zeros(40, 24, dtype=torch.float64, device=DEVICE)
    for _ in range(4):
        x = torch.randn(50, 24, device=DEVICE).bfloat16()
        upstream = torch.randn(50, 40, device=DEVICE).bfloat16()
        exact += upstream.double().T @ x.double()
        for module in (layer, other):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                module(x.detach().requires_grad_()).backward(upstream)
    assert layer.weight.grad is not None
    assert other.weight.grad is not None
    errors = [float((found.double() - exact).norm() / exact.norm()) for found in (layer.weight.grad, other.weight.grad)]
    assert errors[1] < 1e-5 < errors[0] < 1e-2
    assert distance(gradients(placed, half=True), gradients(plain, half=True)) < 1e-2


@pytest.mark.parametrize("mode", ActivationCheckpointing)
@pytest.mark.parametrize("half", [False, True])
def test_compiled_blocks_add_too(half: bool, mode: ActivationCheckpointing) -> None:
    torch.compiler.reset()
    plain, placed = models("blt-debug", mode)
    compile_blocks(placed, backend="aot_eager")
    limit = 1e-2 if half else 1e-5
    assert distance(gradients(placed, half=half, steps=2), gradients(plain, half=half, steps=2)) < limit
    torch.compiler.reset()


class WhereProductsAreAdded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes the memory that products are added to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.blt_model.add_product.default:
            self.places.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


def test_compiled_code_adds_in_place() -> None:
    """The sums are not copied to be changed and copied back; and modules of one kind share their code."""
    if not CUDA:
        try:
            check_cpp_compiler()
        except ConfigError:
            pytest.skip("needs a C++ compiler")
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    layers = nn.ModuleList(SwiGLU(32, 48) for _ in range(2)).to(DEVICE)
    accumulate_in_place(layers, maps=True)
    begin_accumulation(layers)
    for layer in layers:
        layer.compile(dynamic=False)
    sums = {
        item.gradient_sum.data_ptr()
        for item in layers.modules()
        if isinstance(item, Linear) and item.gradient_sum is not None
    }
    for index in range(3):
        x = torch.randn(64, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = layers[1](layers[0](x)).float().square().sum()
        if index == 0:
            # The first time the compiler would run under the mode, too.
            loss.backward()
            continue
        with WhereProductsAreAdded() as products:
            loss.backward()
        assert len(products.places) == 4
        assert set(products.places) == sums
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_without_a_gradient_of_the_input_autograd_makes_it() -> None:
    layer = Linear(8, 8).to(DEVICE)
    nn.init.normal_(layer.weight)
    accumulate_in_place(layer, maps=True)
    x = torch.randn(3, 8, device=DEVICE)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    begin_accumulation(layer)
    layer(x).sum().backward()
    assert layer.weight.grad is layer.gradient_sum
    torch.testing.assert_close(layer.gradient_sum, x.sum(0).expand(8, 8))


def test_the_trainer_asks_for_it() -> None:
    architecture = preset("blt-debug", hash_embedding=TABLE)
    batch = BatchConfig(sequences_per_step=8, sequences_per_micro_batch=4)
    config = TrainConfig(run="run", model=ModelConfig(preset="blt-debug"), data=DataConfig(train="data"), batch=batch)
    model, _ = empty_model(architecture, config, torch.device("cpu"), None)
    assert isinstance(model, BLT)
    assert model.encoder.hash_embedding is not None
    assert model.encoder.hash_embedding.accumulates_in_place
    # Only products in half precision gain by it.
    assert model.decoder.head.gradient_sum is None


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3, float("inf"), float("nan")])
def test_clipping_gives_torchs_bits(factor: float) -> None:
    torch.manual_seed(0)
    own, theirs = (
        [nn.Parameter(torch.zeros(5, 7)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))] for _ in range(2)
    )
    for one, other in zip(own[:2], theirs[:2], strict=True):
        one.grad = torch.randn_like(one) * factor
        other.grad = one.grad.clone()
    before = [item.grad.clone() for item in own if item.grad is not None]
    norm = clip_whole(own, 2.0)
    expected = float(nn.utils.clip_grad_norm_(theirs, 2.0))
    if factor in (1e-3, 1.0, 1e3):
        assert norm == expected
        assert all(torch.equal(one.grad, other.grad) for one, other in zip(own[:2], theirs[:2], strict=True))  # type: ignore[arg-type]
    else:
        assert norm == expected or norm != norm
        assert all(
            torch.equal(item.grad.nan_to_num(), old.nan_to_num())
            for item, old in zip(own, before, strict=False)
            if item.grad is not None
        )
