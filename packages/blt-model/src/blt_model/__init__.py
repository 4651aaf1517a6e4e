"""The Byte Latent Transformer and its entropy language model in PyTorch."""

from blt_model.attention import AttentionBackend
from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM, next_byte_entropy
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
from blt_model.flops import blt_flops, byte_lm_flops, parameter_counts
from blt_model.generation import Completion, Generator, NextPatch, Request, SamplingOptions
from blt_model.loss import cross_entropy_and_z_sum, cross_entropy_sum
from blt_model.packed import PackedBatch, pack_documents
from blt_model.quantization import quantize_int8
from blt_model.scoring_trunk import ScoringTrunk
from blt_model.weights import (
    LoadedModel,
    WeightFormat,
    load,
    load_model,
    model_fingerprint,
    save_model,
    save_transformers,
)
from blt_model.window_stream import StreamState

__all__ = [
    "BLT",
    "PRESETS",
    "AttentionBackend",
    "BLTConfig",
    "ByteLM",
    "ByteLMConfig",
    "Completion",
    "CrossAttentionConfig",
    "Generator",
    "HashEmbeddingConfig",
    "LoadedModel",
    "ModelConfig",
    "ModelError",
    "NextPatch",
    "PackedBatch",
    "Placement",
    "Pooling",
    "Request",
    "SamplingOptions",
    "ScoringTrunk",
    "StreamState",
    "TransformerConfig",
    "WeightFormat",
    "blt_flops",
    "byte_lm_flops",
    "cross_entropy_and_z_sum",
    "cross_entropy_sum",
    "from_json",
    "load",
    "load_model",
    "model_fingerprint",
    "next_byte_entropy",
    "pack_documents",
    "parameter_counts",
    "preset",
    "quantize_int8",
    "save_model",
    "save_transformers",
    "to_json",
]
