"""transformers' Blt classes beside ours: the same architecture, and their weights under our names."""

from typing import Any

import torch
from torch import Tensor
from transformers import BltConfig
from transformers.models.blt.configuration_blt import BltPatcherConfig
from transformers.models.blt.modeling_blt import BltForCausalLM, BltPatcher

from blt_model import BLTConfig, ByteLMConfig, TransformerConfig
from blt_model.weights.naming import Pieces, blt_pieces, byte_lm_pieces
from blt_model.weights.transformers_format import NAMES

Weights = dict[str, Tensor]


def _joined(theirs: Weights, pieces: Pieces) -> Weights:
    return {ours: torch.cat([theirs[piece.name] for piece in parts]) for ours, parts in pieces.items()}


def byte_lm_weights(theirs: Weights, config: ByteLMConfig) -> Weights:
    """BltPatcher to ByteLM."""
    return _joined(theirs, byte_lm_pieces(NAMES, config))


def blt_weights(theirs: Weights, config: BLTConfig) -> Weights:
    """BltForCausalLM to BLT.

    transformers starts the patches afresh at every encoder layer that has cross-attention, so that only the last
    counts: where it has several, ours has one, at the last layer.
    """
    prefix = "model.local_encoder.cross_attn_layers"
    last = max(int(name.split(".")[3]) for name in theirs if name.startswith(prefix))
    return _joined(theirs, blt_pieces(NAMES, config, encoder_cross_layer=last))


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
