"""Configurations: JSON form, presets, refusals."""

import json
from typing import Any

import pytest

from blt_model import (
    PRESETS,
    BLTConfig,
    ByteLMConfig,
    ModelError,
    Pooling,
    TransformerConfig,
    from_json,
    preset,
    to_json,
)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    document = json.loads(json.dumps(to_json(PRESETS[name])))
    assert from_json(document) == PRESETS[name]
    assert document["architecture"] == ("byte-lm" if name.startswith("entropy") else "blt")


def test_overrides_replace_only_what_they_name() -> None:
    config = preset("blt-debug", latent={"num_layers": 5}, cross_attention={"pooling": "mean"})
    assert isinstance(config, BLTConfig)
    base = PRESETS["blt-debug"]
    assert isinstance(base, BLTConfig)
    assert config.latent == TransformerConfig(dim=base.latent.dim, num_layers=5, num_heads=base.latent.num_heads)
    assert config.cross_attention.pooling is Pooling.MEAN
    assert config.encoder == base.encoder


def test_feed_forward_width_is_the_released_models() -> None:
    widths = {dim: TransformerConfig(dim=dim, num_layers=1, num_heads=4).feed_forward_dim for dim in (768, 1024, 2048)}
    assert widths == {768: 2048, 1024: 2816, 2048: 5632}


def test_released_entropy_model_has_its_own_rotary_base() -> None:
    config = PRESETS["entropy-100m"]
    assert isinstance(config, ByteLMConfig)
    assert config.transformer.rope_theta == 10_000
    assert config.window == 512


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"latnt": {"num_layers": 2}}, "latnt is no configuration key; did you mean latent?"),
        ({"latent": {"layers": 2}}, "latent.layers is no configuration key; did you mean latent.num_layers?"),
        ({"latent": {"num_layers": 0}}, "at least 1 layer"),
        ({"latent": {"num_layers": "2"}}, "must be of type int"),
        ({"latent": {"num_layers": True}}, "must be of type int"),
        ({"latent": {"num_heads": 3}}, "no multiple"),
        ({"latent": {"num_kv_heads": 4, "num_heads": 2}}, "does not divide"),
        ({"latent": 3}, "must be a mapping"),
        ({"encoder": {"window": 0}}, "window is 0"),
        ({"encoder": {"dim": 64}}, "differ"),
        ({"cross_attention": {"num_heads": 5}}, "does not divide encoder.dim"),
        ({"cross_attention": {"pooling": "sum"}}, "choose one of max, mean"),
        ({"hash_embedding": {"ngram_sizes": [3, 3]}}, "different whole numbers"),
        ({"hash_embedding": {"num_functions": 12}}, "11 primes"),
        ({"architecture": "gpt"}, "choose one of byte-lm, blt"),
        ({"architecture": ["blt"]}, "choose one of byte-lm, blt"),
        ({"format_version": 2}, "reads version 1"),
    ],
)
def test_refusals_name_field_and_mend(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words.replace("?", r"\?")):
        preset("blt-debug", **overrides)


def test_missing_field_is_named() -> None:
    document = to_json(PRESETS["blt-debug"])
    del document["latent"]["dim"]
    with pytest.raises(ModelError, match=r"latent\.dim is missing"):
        from_json(document)


def test_byte_lm_needs_a_window() -> None:
    with pytest.raises(ModelError, match="needs a window"):
        preset("entropy-debug", transformer={"window": None})


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean 'blt-1b'"):
        preset("blt_1b")
