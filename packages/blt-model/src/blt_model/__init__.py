"""The Byte Latent Transformer and its entropy language model in PyTorch."""

from blt_model.attention import AttentionBackend
from blt_model.byte_lm import ByteLM, StreamState, next_byte_entropy
from blt_model.config import (
    PRESETS,
    BLTConfig,
    ByteLMConfig,
    CrossAttentionConfig,
    HashEmbeddingConfig,
    ModelConfig,
    Placement,
    Pooling,
    TransformerConfig,
    from_json,
    preset,
    to_json,
)
from blt_model.errors import ModelError
from blt_model.packed import PackedBatch, pack_documents

__all__ = [
    "PRESETS",
    "AttentionBackend",
    "BLTConfig",
    "ByteLM",
    "ByteLMConfig",
    "CrossAttentionConfig",
    "HashEmbeddingConfig",
    "ModelConfig",
    "ModelError",
    "PackedBatch",
    "Placement",
    "Pooling",
    "StreamState",
    "TransformerConfig",
    "from_json",
    "next_byte_entropy",
    "pack_documents",
    "preset",
    "to_json",
]
