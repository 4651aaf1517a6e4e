"""The format of transformers' `BltForCausalLM` and `BltPatcher`: config.json and (sharded) safetensors.

Legend of its words: global = latent transformer; patcher = entropy model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from blt_model.config import (
    BLTConfig,
    ByteLMConfig,
    CrossAttentionConfig,
    HashEmbeddingConfig,
    Placement,
    Pooling,
    TransformerConfig,
)
from blt_model.errors import ModelError
from blt_model.vocabulary import VOCABULARY_SIZE
from blt_model.weights.naming import Names

PATCHER_PREFIX: Final = "model.patcher."

NAMES: Final = Names(
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    attention_norm="input_layernorm",
    feed_forward=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    feed_forward_norm="post_attention_layernorm",
    cross=("q_proj", "k_proj", "v_proj", "o_proj"),
    cross_query_norm="q_norm",
    cross_key_norm="k_norm",
    embedding="embed_tokens",
    encoder="model.local_encoder.",
    latent="model.global_transformer.",
    decoder="model.local_decoder.",
    decoder_head="lm_head",
    hash_tables="model.encoder_hash_tok_embedding",
    byte_lm_head="lm_head",
)

_ROPE_THETA: Final = 500_000.0
#: What transformers takes where a config.json is silent: sizes of the 1B model.
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "patcher_config": {
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
    },
    "encoder_config": {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16},
    "global_config": {
        "hidden_size": 2048,
        "num_hidden_layers": 25,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
    },
    "decoder_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 9,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
    },
}


def byte_lm_config(document: Mapping[str, Any]) -> ByteLMConfig:
    """The entropy model that a `blt_patcher` configuration describes.

    Args:
        document: config.json of a `BltPatcher`, or the `patcher_config` of a `BltForCausalLM`.

    Raises:
        ModelError: the configuration asks for what this package does not compute.
    """
    return ByteLMConfig(transformer=_part(document, "patcher_config", document.get("sliding_window", 512)))


def blt_config(document: Mapping[str, Any]) -> BLTConfig:
    """The BLT that a `blt` configuration describes.

    Where the encoder has cross-attention in all layers, only the last one has an effect in transformers, as each
    starts from the pooled bytes again; ours then has one, after the last layer.

    Args:
        document: config.json of a `BltForCausalLM`.

    Raises:
        ModelError: the configuration asks for what this package does not compute.
    """
    window = document.get("local_attention_window_len", 512)
    encoder, decoder = _mapping(document, "encoder_config"), _mapping(document, "decoder_config")
    everywhere = decoder.get("cross_attn_all_layers", True)
    encoder_part = _part(encoder, "encoder_config", window)
    return BLTConfig(
        encoder=encoder_part,
        latent=_part(_mapping(document, "global_config"), "global_config", None),
        decoder=_part(decoder, "decoder_config", window),
        cross_attention=CrossAttentionConfig(
            num_heads=encoder_part.num_heads,
            k=document.get("cross_attn_k", 2),
            encoder_placement=Placement.LAST,
            decoder_placement=Placement.ALL if everywhere else Placement.FIRST,
        ),
        hash_embedding=HashEmbeddingConfig(
            ngram_sizes=tuple(document.get("encoder_hash_byte_group_size") or (3, 4, 5, 6, 7, 8)),
            num_functions=document.get("encoder_hash_byte_group_nb_functions", 1),
            table_size=document.get("encoder_hash_byte_group_vocab", 500_002),
        ),
    )


def encoder_cross_layer(document: Mapping[str, Any]) -> int:
    """Index of the encoder's cross-attention that has an effect."""
    encoder = _mapping(document, "encoder_config")
    layers: int = encoder.get("num_hidden_layers", 1)
    return layers - 1 if encoder.get("cross_attn_all_layers", False) else 0


def patching_of(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The patch scheme that the configuration names, in blt-patcher's JSON form; None if it is not by entropy."""
    if document.get("patching_mode", "entropy") != "entropy":
        return None
    return {
        "scheme": "entropy",
        "version": 1,
        "max_patch_length": document.get("max_patch_length"),
        "threshold": float(document.get("patching_threshold") or 1.335442066192627),
    }


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"{key} is no JSON object.")
    return value


def _part(document: Mapping[str, Any], part: str, window: int | None) -> TransformerConfig:
    values = {**_DEFAULTS[part], **{key: value for key, value in document.items() if value is not None}}
    if values.get("vocab_size", VOCABULARY_SIZE) != VOCABULARY_SIZE:
        raise ModelError(
            f"{part}.vocab_size is {values['vocab_size']}; this package's vocabulary has {VOCABULARY_SIZE}."
        )
    if values.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{part}.hidden_act is {values['hidden_act']!r}; this package computes 'silu'.")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
        raise ModelError(f"{part} scales its rotary positions ({rope}); this package computes 'default' ones.")
    return TransformerConfig(
        dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values.get("num_key_value_heads"),
        ffn_dim=values.get("intermediate_size") or int(8 * values["hidden_size"] / 3),
        window=window,
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", _ROPE_THETA))),
        norm_eps=float(values.get("rms_norm_eps", values.get("norm_eps", 1e-5))),
    ).in_shortest_form()


def document_of_byte_lm(config: ByteLMConfig) -> dict[str, Any]:
    """The `blt_patcher` configuration of an entropy model."""
    return {"model_type": "blt_patcher", **_document_of_part(config.transformer), "sliding_window": config.window}


def document_of_blt(config: BLTConfig, dtype: str) -> dict[str, Any]:
    """The `blt` configuration of a BLT, without its entropy model.

    Args:
        config: of the model.
        dtype: of the weights, such as "float32".

    Raises:
        ModelError: the model computes what `BltForCausalLM` does not; all such fields are named.
    """
    if problems := _departures(config):
        raise ModelError(
            f"transformers' BltForCausalLM does not compute this model ({'; '.join(problems)}); export it as native."
        )
    cross, tables = config.cross_attention, config.hash_embedding
    local = {"cross_attn_k": cross.k, "hidden_size_global": config.latent.dim, "sliding_window": config.encoder.window}
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "dtype": dtype,
        "vocab_size": VOCABULARY_SIZE,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        # Its cached generation departs from its own uncached result (release 5.23).
        "use_cache": False,
        "cross_attn_k": cross.k,
        "local_attention_window_len": config.encoder.window,
        "encoder_hash_byte_group_size": list(tables.ngram_sizes),
        "encoder_hash_byte_group_vocab": tables.table_size,
        "encoder_hash_byte_group_nb_functions": tables.num_functions,
        "patch_in_forward": False,
        "encoder_config": {
            "model_type": "blt_local_encoder",
            **_document_of_part(config.encoder),
            **local,
            "cross_attn_all_layers": False,
        },
        "global_config": {"model_type": "blt_global_transformer", **_document_of_part(config.latent)},
        "decoder_config": {
            "model_type": "blt_local_decoder",
            **_document_of_part(config.decoder),
            **local,
            "cross_attn_all_layers": cross.decoder_placement is Placement.ALL,
        },
    }


def _departures(config: BLTConfig) -> list[str]:
    """What `BltForCausalLM` cannot compute."""
    cross, tables = config.cross_attention, config.hash_embedding
    one_layer = config.encoder.num_layers == 1
    conditions = {
        "pooling is not max": cross.pooling is not Pooling.MAX,
        "double_residual is false": not cross.double_residual,
        "the encoder's cross-attention is not after its last layer alone": not one_layer
        and cross.encoder_placement is not Placement.LAST,
        "the decoder's cross-attention is only before its last layer": config.decoder.num_layers > 1
        and cross.decoder_placement is Placement.LAST,
        "cross_attention.num_heads differs from the local models' heads": not (
            cross.num_heads == config.encoder.num_heads == config.decoder.num_heads
        ),
        "the local windows differ": config.encoder.window != config.decoder.window,
        "the latent transformer has a window": config.latent.window is not None,
        "there is no hash embedding": not tables.ngram_sizes,
        "hash embeddings follow the paper": tables.newest_first
        or tables.raw_bytes
        or tables.omit_partial
        or tables.average,
    }
    return [name for name, holds in conditions.items() if holds]


def _document_of_part(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.feed_forward_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
