"""Sharded models against plain ones: losses, gradients, initial weights; recomputation, compilation and float8."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.blt_train.parallel_ranks import WAYS, micro_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blt_model import BLT, AttentionBackend, preset
from blt_model.layers import Block
from blt_model.loss import cross_entropy_sum
from blt_train.config import ActivationCheckpointing, ParallelConfig
from blt_train.errors import ConfigError
from blt_train.parallel.compilation import compile_blocks, uncompiled
from blt_train.parallel.float8 import check_float8, float8_maps, use_float8
from blt_train.parallel.recomputation import recompute_blocks
from blt_train.parallel.rows import chunk, row_offsets
from blt_train.parallel.seeding import BLOCK_NUMBERS, fresh_model, meta_model

#: The first weights of the head of entropy-debug under seed 0.
FROZEN_WEIGHTS = [0.0968677551, -0.148794085, -0.0411968008, 0.0527399443]

SPREAD = [(name, ranks) for name, way in WAYS.items() for ranks in way.ranks if ranks > 1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every way of spreading gave."""
    output = tmp_path_factory.mktemp("ways")
    command = [sys.executable, "-m", "tests.blt_train.parallel_ranks", str(output)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    return output


def read(results: Path, name: str, ranks: int) -> dict[str, Any]:
    """The figures of one way."""
    content: dict[str, Any] = json.loads((results / f"{name}-{ranks}.json").read_text(encoding="utf-8"))
    return content


def alone(name: str) -> str:
    """The way of one rank that trains the same model."""
    return name if 1 in WAYS[name].ranks else "plain"


@pytest.mark.parametrize(("name", "ranks"), SPREAD)
def test_losses_and_norms_are_those_of_one_rank(name: str, ranks: int, results: Path) -> None:
    spread, one = read(results, name, ranks), read(results, alone(name), 1)
    for mine, other in zip(spread["steps"], one["steps"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(("name", "ranks"), SPREAD)
def test_every_gradient_is_that_of_one_rank(name: str, ranks: int, results: Path) -> None:
    spread = load_file(results / f"{name}-{ranks}.safetensors")
    one = load_file(results / f"{alone(name)}-1.safetensors")
    assert sorted(spread) == sorted(one)
    for key, gradient in one.items():
        assert gradient.norm() > 0
        assert (spread[key] - gradient).norm() < 1e-5 * gradient.norm(), key


@pytest.mark.parametrize(("name", "ranks"), SPREAD)
def test_initial_weights_are_equal_and_nobody_holds_all(name: str, ranks: int, results: Path) -> None:
    spread, one = read(results, name, ranks), read(results, alone(name), 1)
    assert spread["initial"] == one["initial"]
    (total,) = one["holds"]
    copies = ranks // (WAYS[name].parallel.get("shard_ranks") or ranks)
    if copies == 1:
        assert sum(spread["holds"]) == total
        assert max(spread["holds"]) < 1.01 * total / ranks
    else:
        # The tables have no copies.
        tables = 6 * WAYS[name].hashes["table_size"] * 32
        assert sum(spread["holds"]) == copies * (total - tables) + tables


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 260])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_rows_are_cut_as_torch_cuts_them(rows: int, parts: int) -> None:
    pieces = torch.arange(rows).chunk(parts)
    for index in range(parts):
        first, end = chunk(0, rows, parts, index)
        expected = pieces[index].tolist() if index < len(pieces) else []
        assert list(range(first, end)) == expected
    nested = row_offsets(rows, (2, parts))
    assert nested[0] == 0
    assert nested[-1] == rows
    assert nested == sorted(nested)


def test_initial_weights_have_their_distribution() -> None:
    architecture = preset("blt-tiny")
    model = fresh_model(architecture, seed=3)
    _, deviations = meta_model(architecture)
    # A normal distribution cut at three standard deviations keeps this share of its own.
    kept = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    for name, parameter in model.named_parameters():
        deviation = deviations[name]
        if deviation is None:
            assert (parameter == 1).all()
            continue
        count = parameter.numel()
        assert parameter.abs().max() <= 3.0001 * deviation
        assert parameter.abs().max() > 2.5 * deviation
        assert abs(parameter.mean().item()) < 5 * deviation / math.sqrt(count)
        assert parameter.std().item() == pytest.approx(kept * deviation, rel=5 / math.sqrt(count))
    table = model.get_parameter("encoder.hash_embedding.weight")
    rows = BLOCK_NUMBERS // table.shape[1]
    assert len(table) > rows
    assert not torch.equal(table[:100], table[rows : rows + 100])


def test_initial_weights_follow_from_seed_and_name() -> None:
    architecture = preset("entropy-debug")
    one, again, other = (dict(fresh_model(architecture, seed).named_parameters()) for seed in (0, 0, 1))
    name = "blocks.0.attention.output.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one["blocks.1.attention.output.weight"])
    # Frozen: another release of torch or numpy must not change what a seed stands for.
    expected = torch.tensor(FROZEN_WEIGHTS)
    torch.testing.assert_close(one["head.weight"][0, :4].detach(), expected, rtol=1e-6, atol=0)


def gradients_of(mode: ActivationCheckpointing) -> tuple[dict[str, Tensor], int]:
    """Gradients of a small BLT, and the bytes that autograd keeps for the backward pass."""
    model = fresh_model(preset("blt-tiny", hash_embedding={"table_size": 64}), seed=1)
    recompute_blocks(model, mode)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch, wanted = micro_batch(0, 0, 8, patched=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy_sum(model(batch), wanted)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
    return gradients, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_recomputing_changes_no_gradient_and_keeps_less() -> None:
    plain, all_kept = gradients_of(ActivationCheckpointing.NONE)
    full, few_kept = gradients_of(ActivationCheckpointing.FULL)
    selective, _ = gradients_of(ActivationCheckpointing.SELECTIVE)
    for name, gradient in plain.items():
        torch.testing.assert_close(full[name], gradient, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(selective[name], gradient, rtol=1e-5, atol=1e-7)
    assert few_kept < 0.5 * all_kept


class CountOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the operations that are computed, whatever is answered from what was kept."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        """How many of a name, with its namespace and without an overload."""
        return self._counts[name]


def test_selective_recomputation_repeats_no_kept_product() -> None:
    counts, blocks = {}, 0
    for mode in ActivationCheckpointing:
        model = fresh_model(preset("entropy-debug"), seed=1)
        blocks = sum(isinstance(module, Block) for module in model.modules())
        recompute_blocks(model, mode)
        batch, wanted = micro_batch(0, 0, 8, patched=False)
        with CountOperations() as operations:
            cross_entropy_sum(model(batch), wanted).backward()  # type: ignore[no-untyped-call]
        counts[mode] = operations.of("aten::mm")
    # All but the last product of a block are made again in full, and the first alone where products are kept.
    assert counts[ActivationCheckpointing.FULL] == counts[ActivationCheckpointing.NONE] + 3 * blocks
    assert counts[ActivationCheckpointing.SELECTIVE] == counts[ActivationCheckpointing.NONE] + blocks


@pytest.mark.parametrize("mode", ActivationCheckpointing)
def test_what_is_computed_again_where_cuda_has_kernels(
    mode: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without content: the path is CUDA's, and nothing is launched."""
    pytest.importorskip("triton")
    for module in ("layers", "fused", "loss"):
        monkeypatch.setattr(f"blt_model.{module}.takes_kernels", lambda tensor: True)
    monkeypatch.setattr("blt_model.layers.resolve_backend", lambda *_, **__: AttentionBackend.TRITON)
    monkeypatch.setattr("blt_model.layers.compute_dtype", lambda tensor: tensor.dtype)  # no autocast to ask about
    model, _ = meta_model(preset("entropy-debug"))
    blocks = sum(isinstance(module, Block) for module in model.modules())
    recompute_blocks(model, mode)
    batch, wanted = micro_batch(0, 0, 8, patched=False)
    with CountOperations() as forward:
        loss = cross_entropy_sum(model(batch.to("meta")), wanted.to("meta"))
    with CountOperations() as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    kernels = {name: backward.of(f"blt_model::{name}") for name in ("split_heads", "swiglu", "attend_tiles")}
    again = blocks if mode is not ActivationCheckpointing.NONE else 0
    whole = blocks if mode is ActivationCheckpointing.FULL else 0
    assert kernels == {"split_heads": again, "swiglu": again, "attend_tiles": whole}
    # Two products for the gradients of each, and those that are made again; the last of a block never is.
    assert backward.of("aten::mm") == 2 * forward.of("aten::mm") + 3 * whole


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="torch 2.11 compiles again, on the CPU, for each number of documents",
)
def test_varied_documents_compile_at_most_twice_more_in_a_hundred_steps() -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = fresh_model(preset("blt-debug"), seed=1)
    compile_blocks(model, backend="aot_eager")
    graphs = []
    for step in range(100):
        batch, wanted = micro_batch(step, 0, 3, patched=True)
        cross_entropy_sum(model(batch), wanted).backward()  # type: ignore[no-untyped-call]
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] - graphs[0] <= 2
    with uncompiled(model):
        batch, _ = micro_batch(0, 0, 5, patched=True)
        model(batch)
    assert counters["stats"]["unique_graphs"] == graphs[-1]
    torch.compiler.reset()


def test_float8_takes_the_matrices_of_blocks_alone() -> None:
    names = float8_maps(meta_model(preset("blt-1b"))[0])
    latent = [name for name in names if name.startswith("latent.blocks.")]
    assert len(latent) == 25 * 4
    local = [name for name in names if not name.startswith("latent.")]
    assert len(local) == (1 + 9) * 2
    assert all(".feed_forward." in name for name in local)
    # 200 is no multiple of 16, and neither is what is made of it.
    odd = preset("entropy-debug", transformer={"dim": 40, "ffn_dim": 24, "num_heads": 2})
    assert float8_maps(meta_model(odd)[0]) == []


def test_float8_learns_as_float32_does() -> None:
    pytest.importorskip("torchao")
    batch, wanted = micro_batch(0, 0, 8, patched=True)
    norms, losses = [], []
    for is_rounded in (False, True):
        model = fresh_model(preset("blt-debug"), seed=1)
        before = [name for name, _ in model.named_parameters()]
        if is_rounded:
            assert isinstance(model, BLT)
            use_float8(model, emulate=True)
            assert [name for name, _ in model.named_parameters()] == before
        loss = cross_entropy_sum(model(batch), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        weight = model.get_parameter("latent.blocks.0.feed_forward.output.weight")
        assert weight.grad is not None
        norms.append(weight.grad.norm().item())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_float8_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.float8 is true, but this device \(a CPU\) has no float8 units"):
        check_float8(torch.device("cpu"), (256,))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"torchao is not installed: install blt-train\[float8\]"):
        use_float8(meta_model(preset("blt-debug"))[0])


def test_ranks_divide_into_copies() -> None:
    assert ParallelConfig().shard_size(6) == 6
    assert ParallelConfig(shard_ranks=2).shard_size(6) == 2
    with pytest.raises(ConfigError, match=r"parallel\.shard_ranks is 4, which does not divide 6 process\(es\)"):
        ParallelConfig(shard_ranks=4).shard_size(6)
