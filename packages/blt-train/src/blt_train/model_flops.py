"""Model FLOPs of real batches, exactly: the sum over their documents, whose lengths differ.

All costs but attention are proportional to tokens or patches, so `blt_model.flops` at the batch's mean lengths has them
exactly. Attention costs a document of n positions n times the keys that its positions read on average, which is no
linear function of n: for it the difference between the real documents and equal ones of the mean length is added.
Recomputation by activation checkpointing is no model FLOP and is not counted; neither is padding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blt_model import ByteLMConfig
from blt_model import ModelConfig as ArchitectureConfig
from blt_model.config import TransformerConfig
from blt_model.flops import blt_flops, byte_lm_flops, mean_keys

#: The backward pass costs twice the forward pass: a product for the inputs' gradient, one for the weights'.
TRAINING_FACTOR = 3

Lengths = npt.NDArray[np.int64] | npt.NDArray[np.float64]


def training_flops(architecture: ArchitectureConfig, tokens: Lengths, patches: Lengths) -> float:
    """Return the operations of one forward and backward pass over some documents.

    Args:
        architecture: of either model.
        tokens: [D] input tokens of each document (or piece of one), each at least 1.
        patches: [D] patches of each, at least 1; not read for the byte LM.
    """
    if tokens.size == 0:
        return 0.0
    num_tokens = float(tokens.sum())
    mean_tokens = num_tokens / tokens.size
    if isinstance(architecture, ByteLMConfig):
        forward = num_tokens * byte_lm_flops(architecture, document_bytes=mean_tokens)["total"]
        return TRAINING_FACTOR * (forward + _attention_beyond_mean(architecture.transformer, tokens))
    patch_length = num_tokens / float(patches.sum())
    forward = num_tokens * blt_flops(architecture, patch_length=patch_length, document_bytes=mean_tokens)["total"]
    forward += _attention_beyond_mean(architecture.encoder, tokens)
    forward += _attention_beyond_mean(architecture.decoder, tokens)
    forward += _attention_beyond_mean(architecture.latent, patches)
    return TRAINING_FACTOR * forward


def _attention_beyond_mean(config: TransformerConfig, lengths: Lengths) -> float:
    """Return what attention over documents of these lengths costs more than over equal ones of their mean length."""
    keys = _keys_read(lengths.astype(np.float64), config.window)
    equal = float(lengths.sum()) * mean_keys(max(1.0, float(lengths.mean())), config.window)
    # A score and a weighted sum per query and key: 2 products of `dim` multiplications and additions.
    return config.num_layers * 2 * 2 * config.dim * (keys - equal)


def _keys_read(lengths: npt.NDArray[np.float64], window: int | None) -> float:
    """Return the keys that all positions of documents of these lengths read together, as `mean_keys` has them."""
    full = lengths * (lengths + 1) / 2
    if window is None:
        return float(full.sum())
    return float(np.where(lengths <= window, full, lengths * window - window * (window - 1) / 2).sum())
