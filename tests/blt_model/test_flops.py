"""Parameters against the published figures, operations against what torch counts."""

import numpy as np
import pytest
import torch
from tests.blt_model.samples import framed_document
from torch.utils.flop_counter import FlopCounterMode

from blt_model import (
    BLT,
    PRESETS,
    BLTConfig,
    ByteLM,
    ByteLMConfig,
    ModelError,
    blt_flops,
    byte_lm_flops,
    pack_documents,
    parameter_counts,
    preset,
)
from blt_model.flops import mean_keys, transformer_flops


def test_released_entropy_model() -> None:
    assert parameter_counts(PRESETS["entropy-100m"])["total"] == pytest.approx(99.5e6, rel=5e-4)


def test_released_1b_model() -> None:
    counts = parameter_counts(PRESETS["blt-1b"])
    assert counts["total"] == pytest.approx(4.534e9, rel=1e-4)
    assert counts["hash_embedding"] == 6 * 500_002 * 1024


def test_8b_parts_are_the_papers() -> None:
    """Encoder 20M, latent transformer 6.4B, decoder 120M, counted over transformer blocks."""
    config = PRESETS["blt-8b"]
    assert isinstance(config, BLTConfig)
    with torch.device("meta"):
        model = BLT(config)
    sizes = [sum(p.numel() for p in part.blocks.parameters()) for part in (model.encoder, model.latent, model.decoder)]
    assert sizes == pytest.approx([20e6, 6.4e9, 120e6], rel=0.025)


@pytest.mark.parametrize(
    ("name", "size"), [("blt-400m", 400e6), ("blt-1b", 1e9), ("blt-2b", 2e9), ("blt-4b", 4e9), ("blt-8b", 8e9)]
)
def test_names_say_the_order_of_the_transformers(name: str, size: float) -> None:
    """The paper names its sizes loosely: all but the hash tables lies within a half of the name."""
    counts = parameter_counts(PRESETS[name])
    assert counts["total"] - counts["hash_embedding"] == pytest.approx(size, rel=0.5)


def test_small_presets_are_small() -> None:
    assert 0.5e6 < parameter_counts(PRESETS["entropy-tiny"])["total"] < 1e6
    assert parameter_counts(PRESETS["blt-tiny"])["total"] < 9e6
    assert parameter_counts(PRESETS["blt-debug"])["total"] < 2e5


@pytest.mark.parametrize("name", PRESETS)
def test_parts_sum_to_the_total(name: str) -> None:
    counts = parameter_counts(PRESETS[name])
    assert sum(count for part, count in counts.items() if part != "total") == counts["total"]
    assert all(counts.values())


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("window", [None, 1, 8])
def test_mean_keys_is_exact(length: int, window: int | None) -> None:
    counted = sum(min(i, window or i) for i in range(1, length + 1)) / length
    assert mean_keys(length, window) == pytest.approx(counted, rel=1e-12)


def test_impossible_shapes_are_refused() -> None:
    config = PRESETS["blt-debug"]
    assert isinstance(config, BLTConfig)
    with pytest.raises(ModelError, match="patch_length is 9"):
        blt_flops(config, patch_length=9, document_bytes=8)
    with pytest.raises(ModelError, match="at least 1"):
        mean_keys(0, None)


def matrix_products(model: torch.nn.Module, batch: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))


def attention_flops(config: ByteLMConfig | BLTConfig, tokens: int, patches: int) -> float:
    """What attention adds, which torch's counter sees as one kernel and counts without its mask."""
    if isinstance(config, ByteLMConfig):
        part = config.transformer
        return tokens * part.num_layers * 4 * part.dim * mean_keys(tokens, part.window)
    stacks = ((config.encoder, tokens), (config.latent, patches), (config.decoder, tokens))
    own = sum(n * part.num_layers * 4 * part.dim * mean_keys(n, part.window) for part, n in stacks)
    layers = config.encoder.num_layers * (config.cross_attention.encoder_placement == "all") or 1
    readers = layers + (config.decoder.num_layers if config.cross_attention.decoder_placement == "all" else 1)
    return own + tokens * readers * 4 * config.encoder.dim * config.cross_attention.k


@pytest.mark.parametrize(
    "overrides",
    [{}, {"cross_attention": {"k": 3, "decoder_placement": "last"}}, {"latent": {"num_kv_heads": 1}}],
)
def test_blt_operations_equal_torchs_count(overrides: dict[str, dict[str, int]]) -> None:
    config = preset("blt-debug", **overrides)
    assert isinstance(config, BLTConfig)
    row = framed_document(np.random.default_rng(0), 119)
    batch, _ = pack_documents([row], [np.array([1, *[4] * 30])])
    # 120 input tokens in 31 patches.
    counted = matrix_products(BLT(config), batch) + attention_flops(config, 120, 31)
    flops = blt_flops(config, patch_length=120 / 31, document_bytes=120)
    assert flops["total"] * 120 == pytest.approx(counted, rel=1e-9)
    assert flops["total"] == pytest.approx(sum(f for part, f in flops.items() if part != "total"))


def test_byte_lm_operations_equal_torchs_count() -> None:
    config = PRESETS["entropy-debug"]
    assert isinstance(config, ByteLMConfig)
    batch, _ = pack_documents([framed_document(np.random.default_rng(0), 119)])
    counted = matrix_products(ByteLM(config), batch) + attention_flops(config, 120, 0)
    flops = byte_lm_flops(config, document_bytes=120)
    assert flops["total"] * 120 == pytest.approx(counted, rel=1e-9)
    assert flops["transformer"] == transformer_flops(config.transformer, 120)
