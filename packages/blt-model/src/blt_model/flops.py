"""Exact accounting: floating-point operations per byte and parameters, by part.

A multiplication and an addition count 2. Counted are matrix products and attention (scores and weighted sums over the
keys that are really read); not counted are look-ups, norms, activations and softmax, as in the paper. Training costs
three times the forward pass.
"""

from __future__ import annotations

import torch

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.config import BLTConfig, ByteLMConfig, ModelConfig, Placement, TransformerConfig
from blt_model.errors import ModelError
from blt_model.vocabulary import VOCABULARY_SIZE


def mean_keys(length: float, window: int | None) -> float:
    """Keys that a query reads on average, itself included, in causal attention over one document.

    Args:
        length: positions of the document, at least 1.
        window: positions that a query reads at most; None for no limit.

    Returns:
        The mean over the document's positions; exact for whole lengths.

    Raises:
        ModelError: length below 1.
    """
    if length < 1:
        raise ModelError(f"the context is {length} positions; give at least 1.")
    if window is None or length <= window:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def transformer_flops(config: TransformerConfig, length: float) -> float:
    """Forward operations of a stack of blocks per position.

    Args:
        config: of the stack.
        length: positions of a document.
    """
    dim, kv_dim = config.dim, config.kv_heads * config.head_dim
    projections = 2 * dim * (dim + 2 * kv_dim) + 2 * dim * dim
    feed_forward = 3 * 2 * dim * config.feed_forward_dim
    attention = 2 * 2 * dim * mean_keys(length, config.window)
    return config.num_layers * (projections + feed_forward + attention)


def byte_lm_flops(config: ByteLMConfig, *, document_bytes: float) -> dict[str, float]:
    """Forward operations of the entropy model per byte.

    Args:
        config: of the model.
        document_bytes: mean length of a document, in tokens.

    Returns:
        Operations by part ("transformer", "head") and their "total".
    """
    parts = {
        "transformer": transformer_flops(config.transformer, document_bytes),
        "head": 2.0 * config.transformer.dim * VOCABULARY_SIZE,
    }
    return {**parts, "total": sum(parts.values())}


def blt_flops(config: BLTConfig, *, patch_length: float, document_bytes: float) -> dict[str, float]:
    """Forward operations of BLT per byte, the entropy model not included.

    Args:
        config: of the model.
        patch_length: mean patch length, in tokens.
        document_bytes: mean length of a document, in tokens.

    Returns:
        Operations by part ("encoder", "encoder_cross_attention", "latent", "decoder", "decoder_cross_attention",
        "head") and their "total". The map to k vectors of a patch belongs to the cross-attention that needs it.

    Raises:
        ModelError: patch_length below 1 or above document_bytes.
    """
    if not 1 <= patch_length <= document_bytes:
        raise ModelError(
            f"patch_length is {patch_length}; it must lie between 1 and the {document_bytes} of a document."
        )
    dim, cross = config.encoder.dim, config.cross_attention
    square = 2 * dim * dim
    encoder_layers = config.encoder.num_layers if cross.encoder_placement == Placement.ALL else 1
    decoder_layers = config.decoder.num_layers if cross.decoder_placement == Placement.ALL else 1
    # Each byte makes a key and a value and is read by its patch's k queries; each query has two maps.
    encoder_layer = 2 * square + 2 * 2 * dim * cross.k + 2 * square * cross.k / patch_length
    # The other way round: each byte makes a query, and each patch k keys and values.
    decoder_layer = 2 * square + 2 * 2 * dim * cross.k + 2 * square * cross.k / patch_length
    latent = transformer_flops(config.latent, max(1.0, document_bytes / patch_length))
    if config.projects_patches:
        latent += 2 * config.patch_dim * config.latent.dim
    parts = {
        "encoder": transformer_flops(config.encoder, document_bytes),
        "encoder_cross_attention": encoder_layers * encoder_layer + square * cross.k / patch_length,
        "latent": latent / patch_length,
        "decoder": transformer_flops(config.decoder, document_bytes),
        "decoder_cross_attention": decoder_layers * decoder_layer
        + 2 * config.latent.dim * config.patch_dim / patch_length,
        "head": 2.0 * dim * VOCABULARY_SIZE,
    }
    return {**parts, "total": sum(parts.values())}


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, without allocating any.

    Args:
        config: of either model.

    Returns:
        For a byte-lm "embedding", "transformer", "head"; for a blt "embedding", "hash_embedding", "encoder", "latent",
        "decoder", "head" (norms, projections and cross-attentions with the part that holds them); and their "total".
    """
    with torch.device("meta"):
        model = BLT(config) if isinstance(config, BLTConfig) else ByteLM(config)
    parts: tuple[str, ...] = ("embedding", "transformer", "head")
    if isinstance(config, BLTConfig):
        parts = ("embedding", "hash_embedding", "encoder", "latent", "decoder", "head")
    counts = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        pieces = name.split(".")
        first = pieces[0] if isinstance(config, BLTConfig) else "transformer"
        named = [piece for piece in pieces if piece in ("embedding", "hash_embedding", "head")]
        counts[named[0] if named else first] += parameter.numel()
    return {**counts, "total": sum(counts.values())}
