"""The plan of a run against what real models, optimizers and forward passes take."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests.blt_train.live_memory import held_bytes, pretended_autocast, pretended_cuda
from torch import Tensor, nn

from blt_model import ByteLMConfig, PackedBatch, cross_entropy_and_z_sum, pack_documents, preset
from blt_train import ConfigError, TrainConfig, load_config
from blt_train.cli import main
from blt_train.config import ActivationCheckpointing, OptimizerName
from blt_train.inputs import architecture_of_config
from blt_train.optim import WeightAverage, make_optimizer
from blt_train.parallel.recomputation import recompute_blocks
from blt_train.parallel.seeding import fresh_model, meta_model
from blt_train.planning.activations import ActivationModel
from blt_train.planning.advice import changes_that_fit
from blt_train.planning.memory import Batch, MemoryModel
from blt_train.planning.planner import GPU_MEMORY, make_plan, memory_bytes

#: Document offsets, segments and other small things are not counted; these models are small enough to show them.
TOLERANCE = 0.01
TOKENS, PATCH, DOCUMENTS = 2048, 4, 2

MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "byte LM": ("entropy-debug", {}),
    "BLT": ("blt-debug", {}),
    "projected": ("blt-tiny", {}),
    "other options": (
        "blt-debug",
        {
            "cross_attention": {"k": 3, "decoder_placement": "last", "pooling": "mean"},
            "latent": {"num_kv_heads": 2},
            "decoder": {"window": 16},
        },
    ),
    "everywhere": ("blt-debug", {"encoder": {"num_layers": 2}, "cross_attention": {"encoder_placement": "all"}}),
}


def batch_of(is_byte_lm: bool) -> tuple[PackedBatch, Tensor]:
    """Documents of equal length, whose patches are equal too but for the first."""
    length = TOKENS // DOCUMENTS
    documents = [np.full(length + 1, 7) for _ in range(DOCUMENTS)]
    lengths = [np.array([1] + [PATCH] * (length // PATCH)) for _ in range(DOCUMENTS)]
    return pack_documents(documents, None if is_byte_lm else lengths)


def empty_on(device: str, tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


def forward_bytes(name: str, overrides: Mapping[str, Any], mode: ActivationCheckpointing, device: str) -> int:
    """Bytes that a real forward pass leaves for the backward pass; on `cuda` of tensors without content."""
    config = preset(name, **overrides)
    is_cuda = device == "cuda"
    if is_cuda:
        pytest.importorskip("triton")
    with pretended_cuda() if is_cuda else contextlib.nullcontext():
        model, _ = meta_model(config)
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                module.register_parameter(key, nn.Parameter(empty_on(device, parameter)))
        recompute_blocks(model, mode)
        batch, targets = batch_of(isinstance(config, ByteLMConfig))
        if is_cuda:
            fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
            moved = {key: empty_on(device, item) for key, item in fields.items() if isinstance(item, Tensor)}
            batch, targets = PackedBatch(**{**fields, **moved}), empty_on(device, targets)
        held = []

        def forward() -> Tensor:
            with pretended_autocast() if is_cuda else contextlib.nullcontext():
                logits = model(batch)
            held.append(logits)
            return cross_entropy_and_z_sum(logits, targets, 0.0)[0]

        inputs = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
        known = [*model.parameters(), targets, *(item for item in inputs if isinstance(item, Tensor))]
        return held_bytes(forward, known)


@pytest.mark.parametrize("mode", ActivationCheckpointing)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("label", MODELS)
def test_activations_are_those_of_a_real_forward_pass(label: str, device: str, mode: ActivationCheckpointing) -> None:
    name, overrides = MODELS[label]
    config = preset(name, **overrides)
    model = ActivationModel(architecture=config, compute_bytes=2 if device == "cuda" else 4, is_cpu=device == "cpu")
    patches = DOCUMENTS * (1 + TOKENS // DOCUMENTS // PATCH)
    predicted = sum(model.held(mode, tokens=TOKENS, patches=patches).values())
    if device == "cuda":
        predicted += cast_bytes(name, overrides, mode)
    assert predicted == pytest.approx(forward_bytes(name, overrides, mode, device), rel=TOLERANCE)


def cast_bytes(name: str, overrides: Mapping[str, Any], mode: ActivationCheckpointing) -> int:
    """Weights in bfloat16, as the plan reckons them."""
    config = planned(name, {"model.overrides": overrides, "precision": "bfloat16"}, mode)
    phases = MemoryModel(architecture_of_config(config), config, 1).phases(Batch(tokens=8, patches=8, micro_batches=1))
    return phases["forward"]["weights cast"]


def planned(
    name: str, values: Mapping[str, Any] | None = None, mode: ActivationCheckpointing = ActivationCheckpointing.NONE
) -> TrainConfig:
    """A config of some preset."""
    base = "debug-entropy" if name.startswith("entropy") else "debug-blt"
    settings = {"model.preset": name, "parallel.activation_checkpointing": str(mode), **(values or {})}
    return load_config(base, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


@pytest.mark.parametrize("optimizer_name", OptimizerName)
@pytest.mark.parametrize("name", ["entropy-debug", "blt-debug", "blt-tiny"])
def test_state_is_that_of_a_real_run_to_the_byte(name: str, optimizer_name: OptimizerName) -> None:
    config = planned(name, {"optimizer.name": str(optimizer_name), "optimizer.ema_decay": 0.9})
    model = fresh_model(architecture_of_config(config), 0)
    optimizer, average = make_optimizer(model, config.optimizer), WeightAverage(model, 0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = [*model.parameters(), *average.tensors.values()]
    tensors += [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    state = MemoryModel(architecture_of_config(config), config, 1).state()
    assert sum(state.values()) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_phases_of_a_step() -> None:
    """Gradients are there after a backward pass only, and those of hash tables twice when they are added."""
    config = planned("blt-debug", {"logging.update_norm": True})
    model = MemoryModel(architecture_of_config(config), config, 1)
    one, two = (model.phases(Batch(tokens=512, patches=128, micro_batches=count)) for count in (1, 2))
    tables = 4 * 64 * 6 * 32
    assert one["forward"]["gradients"] == 0
    assert two["forward"]["gradients"] == one["backward"]["gradients"] == one["update"]["gradients"] > 0
    assert two["forward"]["hash tables"] - one["forward"]["hash tables"] == tables
    assert two["backward"]["hash tables"] == one["backward"]["hash tables"] == two["update"]["hash tables"]
    parameters = sum(parameter.numel() for parameter in fresh_model(architecture_of_config(config), 0).parameters())
    assert one["update"]["work space"] == 4 * parameters


def test_more_ranks_need_less_each_and_kept_gradients_are_whole() -> None:
    alone, eight = (planned("blt-tiny", {"plan.gpus": count}) for count in (1, 8))
    architecture = architecture_of_config(alone)
    whole, part = (sum(MemoryModel(architecture, c, c.plan.gpus).state().values()) for c in (alone, eight))
    assert part == pytest.approx(whole / 8, rel=0.01)
    batch = Batch(tokens=512, patches=128, micro_batches=4)
    kept = MemoryModel(architecture, eight, 8).phases(batch)["forward"]["gradients"]
    dense = sum(p.numel() for key, p in fresh_model(architecture, 0).named_parameters() if "hash" not in key)
    assert kept == 4 * dense
    reduced = planned("blt-tiny", {"plan.gpus": 8, "parallel.reduce_each_micro_batch": True})
    assert MemoryModel(architecture, reduced, 8).phases(batch)["forward"]["gradients"] < kept / 4


@pytest.mark.parametrize(
    ("name", "sequence", "micro", "mode", "measured"),
    [
        ("entropy-100m", 4096, 16, "none", 24.76e9),
        ("blt-400m", 8192, 8, "none", 69.39e9),
        ("blt-400m", 8192, 8, "selective", 61.18e9),
    ],
)
def test_peaks_measured_on_a_gpu(name: str, sequence: int, micro: int, mode: str, measured: float) -> None:
    """Figures of tools.bench.gpu.peak_memory on an H200: what fits by the plan fits."""
    config = load_config(
        name,
        [
            f"data.sequence_tokens={sequence}",
            f"batch.sequences_per_step={micro}",
            f"batch.sequences_per_micro_batch={micro}",
            f"parallel.activation_checkpointing={mode}",
            "logging.update_norm=false",
        ],
    )
    assert measured < memory_bytes(config) < 1.16 * measured


def test_time_follows_from_arithmetic() -> None:
    plan = make_plan(load_config("blt-400m", ["plan.gpus=8", "plan.mfu=0.5", "model.preset=blt-1b"]), total_bytes=1e12)
    assert plan.bytes == pytest.approx(1e12, rel=1e-4)
    assert plan.flops == pytest.approx(plan.bytes * 3 * plan.forward_flops_per_byte["total"])
    assert plan.days == pytest.approx(plan.flops / (8 * 989.4e12 * 0.5) / 86400)
    assert plan.bytes_per_second * plan.days * 86400 == pytest.approx(plan.bytes)
    assert plan.gpu_hours == pytest.approx(plan.days * 24 * 8)
    # 99.5 million parameters, two operations each, and attention.
    assert plan.scoring_flops == pytest.approx(0.22e9 * plan.bytes, rel=0.05)
    assert sum(v for k, v in plan.parameters.items() if k != "total") == plan.parameters["total"]


def test_what_does_not_fit_is_told_with_changes_that_do() -> None:
    config = load_config("blt-400m", ["model.preset=blt-8b", "plan.gpus=8", "data.sequence_tokens=16384"])
    changes = changes_that_fit(config)
    assert changes
    assert not make_plan(config).fits
    mended = load_config("blt-400m", ["model.preset=blt-8b", "plan.gpus=8", "data.sequence_tokens=16384", *changes])
    assert make_plan(mended).fits
    assert changes_that_fit(mended) == []
    tables = {"hash_embedding": {"table_size": 2_000_000_000}}
    hopeless = load_config("blt-400m", [f"model.overrides={json.dumps(tables)}"])
    assert changes_that_fit(hopeless) is None
    assert memory_bytes(hopeless) > GPU_MEMORY[hopeless.plan.gpu]


def test_command() -> None:
    done = CliRunner().invoke(main, ["plan", "debug-blt", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["fits"]
    assert plan["changes_that_fit"] is None
    assert sum(plan["memory"].values()) == plan["memory_bytes"]
    assert set(plan["memory_by_checkpointing"]) == {"none", "selective", "full"}
    arguments = ["plan", "blt-400m", "model.preset=blt-8b", "--gpus", "8", "--gpu", "h100", "--bytes", "1TB"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 3
    for text in ("10,553,570,560", "latent", "optimizer", "hash tables", "does not fit: ", "fits with batch.", "days"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.gpus=3"], "no multiple of 3 process"),
        (["plan.mfu=1.5"], "plan.mfu must be above 0 and at most 1, not 1.5"),
        (["plan.patch_length=0.5"], "plan.patch_length must be at least 1 and at most"),
        (["plan.entropy_preset=blt-1b"], "plan.entropy_preset is blt-1b, a BLT"),
        (["plan.entropy_preset=entropy"], "plan.entropy_preset: 'entropy' is no preset"),
        (["plan.gpu=a100", "parallel.float8=true"], "an a100 has no float8"),
        (["plan.gpu=tpu"], "plan.gpu must be one of a100, h100, h200"),
        (["plan.gpus=8", "parallel.shard_ranks=3"], "parallel.shard_ranks is 3, which does not divide 8"),
    ],
)
def test_wrong_plans(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(load_config("blt-400m", overrides))
    assert message in str(caught.value)
