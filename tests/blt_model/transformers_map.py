"""Maps the weights of transformers' Blt classes to ours: what the comparisons need, no more."""

from typing import Any

import torch
from torch import Tensor
from transformers import BltConfig
from transformers.models.blt.configuration_blt import BltPatcherConfig
from transformers.models.blt.modeling_blt import BltForCausalLM, BltPatcher

from blt_model import BLTConfig, ByteLMConfig, TransformerConfig

Weights = dict[str, Tensor]


def block(theirs: Weights, source: str, target: str) -> Weights:
    """One transformer block."""
    qkv = [theirs[f"{source}.self_attn.{x}_proj.weight"] for x in "qkv"]
    return {
        f"{target}.attention_norm.weight": theirs[f"{source}.input_layernorm.weight"],
        f"{target}.attention.query_key_value.weight": torch.cat(qkv),
        f"{target}.attention.output.weight": theirs[f"{source}.self_attn.o_proj.weight"],
        f"{target}.feed_forward_norm.weight": theirs[f"{source}.post_attention_layernorm.weight"],
        f"{target}.feed_forward.gate_value.weight": torch.cat(
            [theirs[f"{source}.mlp.gate_proj.weight"], theirs[f"{source}.mlp.up_proj.weight"]]
        ),
        f"{target}.feed_forward.output.weight": theirs[f"{source}.mlp.down_proj.weight"],
    }


def cross(theirs: Weights, source: str, target: str) -> Weights:
    """One cross-attention."""
    return {
        f"{target}.query_norm.weight": theirs[f"{source}.q_norm.weight"],
        f"{target}.key_norm.weight": theirs[f"{source}.k_norm.weight"],
        f"{target}.query.weight": theirs[f"{source}.q_proj.weight"],
        f"{target}.key_value.weight": torch.cat([theirs[f"{source}.k_proj.weight"], theirs[f"{source}.v_proj.weight"]]),
        f"{target}.output.weight": theirs[f"{source}.o_proj.weight"],
    }


def byte_lm_weights(theirs: Weights, num_layers: int) -> Weights:
    """BltPatcher to ByteLM."""
    ours = {
        "embedding.weight": theirs["embed_tokens.weight"],
        "norm.weight": theirs["norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for layer in range(num_layers):
        ours |= block(theirs, f"layers.{layer}", f"blocks.{layer}")
    return ours


def blt_weights(theirs: Weights, config: BLTConfig) -> Weights:
    """BltForCausalLM to BLT.

    transformers starts the patches afresh at every encoder layer that has cross-attention, so that only the last
    counts: where it has several, ours has one, at the last layer.
    """
    encoder, decoder = "model.local_encoder", "model.local_decoder"
    encoder_cross = max(int(name.split(".")[3]) for name in theirs if name.startswith(f"{encoder}.cross_attn_layers"))
    decoder_cross = {int(name.split(".")[3]) for name in theirs if name.startswith(f"{decoder}.cross_attn_layers")}
    ours = {
        "encoder.embedding.weight": theirs[f"{encoder}.embed_tokens.weight"],
        "encoder.hash_embedding.weight": theirs["model.encoder_hash_tok_embedding.weight"],
        "encoder.patch_projection.weight": theirs[f"{encoder}.patch_embedding_projection.weight"],
        "decoder.patch_projection.weight": theirs[f"{decoder}.patch_embedding_projection.weight"],
        "decoder.norm.weight": theirs[f"{decoder}.norm.weight"],
        "decoder.head.weight": theirs["lm_head.weight"],
    }
    if config.projects_patches:
        ours["latent.projection.weight"] = theirs["model.global_transformer.token_embedding_projection.weight"]
    last = config.encoder.num_layers - 1
    ours |= cross(theirs, f"{encoder}.cross_attn_layers.{encoder_cross}", f"encoder.cross_attention.{last}")
    for layer in decoder_cross:
        ours |= cross(theirs, f"{decoder}.cross_attn_layers.{layer}", f"decoder.cross_attention.{layer}")
    for source, target, part in (
        (encoder, "encoder", config.encoder),
        ("model.global_transformer", "latent", config.latent),
        (decoder, "decoder", config.decoder),
    ):
        for layer in range(part.num_layers):
            ours |= block(theirs, f"{source}.layers.{layer}", f"{target}.blocks.{layer}")
    return ours


def _part(config: TransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.feed_forward_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def their_patcher(config: ByteLMConfig, attention: str = "eager") -> BltPatcher:
    """A BltPatcher of the same architecture, with its own random weights."""
    theirs = BltPatcherConfig(**_part(config.transformer), sliding_window=config.window)
    theirs._attn_implementation = attention
    return BltPatcher(theirs)


def their_blt(
    config: BLTConfig, *, encoder_all: bool = False, decoder_all: bool = True, attention: str = "eager"
) -> BltForCausalLM:
    """A BltForCausalLM of the same architecture, without patcher, with its own random weights."""
    k = config.cross_attention.k
    shared = {"cross_attn_k": k, "hidden_size_global": config.latent.dim}
    theirs = BltConfig(
        patch_in_forward=False,
        cross_attn_k=k,
        local_attention_window_len=config.encoder.window,
        encoder_hash_byte_group_size=list(config.hash_embedding.ngram_sizes),
        encoder_hash_byte_group_vocab=config.hash_embedding.table_size,
        encoder_hash_byte_group_nb_functions=config.hash_embedding.num_functions,
        encoder_config={**_part(config.encoder), **shared, "cross_attn_all_layers": encoder_all},
        decoder_config={**_part(config.decoder), **shared, "cross_attn_all_layers": decoder_all},
        global_config=_part(config.latent),
    )
    theirs._attn_implementation = attention
    return BltForCausalLM(theirs)
