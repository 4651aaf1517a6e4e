"""The layout of the weights that Meta released (`facebook/blt-1b`, `facebook/blt-7b`, `facebook/blt-entropy`).

    config.json                      {"args": {...}}, as the hub's mixin writes it
    model.safetensors
    entropy_model/params.json        {"entropy_model": {...}, "data": {"patcher_args": {...}}}
    entropy_model/consolidated.pth

The names and keys are those that transformers' conversion script for Blt reads (Apache-2.0).
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
    TransformerConfig,
)
from blt_model.errors import ModelError
from blt_model.weights.naming import Names
from blt_model.weights.tensor_files import TensorFiles

NAMES: Final = Names(
    attention=("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    attention_norm="attention_norm",
    feed_forward=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
    feed_forward_norm="ffn_norm",
    cross=("wq", "wk", "wv", "wo"),
    cross_query_norm="cross_attn_norm_q",
    cross_key_norm="cross_attn_norm_kv",
    embedding="tok_embeddings",
    encoder="local_encoder.",
    latent="global_transformer.",
    decoder="local_decoder.",
    decoder_head="local_decoder.output",
    hash_tables="encoder_hash_tok_embedding.{i}",
    byte_lm_head="output",
)

#: Rotary base of a configuration that does not name one.
_ROPE_THETA: Final = 10_000.0
_WINDOW: Final = 512


def derived_tensors(files: TensorFiles) -> set[str]:
    """Names of tensors that are no weights: rotary tables, which follow from the configuration."""
    return {name for name in files.tensors if name.rsplit(".", maxsplit=1)[-1] in ("freqs_cis", "inv_freq")}


def byte_lm_config(args: Mapping[str, Any], files: TensorFiles) -> ByteLMConfig:
    """The entropy model of a released configuration.

    Args:
        args: of the model: `args` of a config.json, or `entropy_model` of a params.json.
        files: the weights; the inner width of SwiGLU is what they have.

    Raises:
        ModelError: a size is missing.
    """
    part = _part(args, "", files, "layers.0", _window(args, "sliding_window"))
    return ByteLMConfig(transformer=part)


def blt_config(args: Mapping[str, Any], files: TensorFiles) -> BLTConfig:
    """The BLT of a released configuration.

    Args:
        args: of the model: `args` of its config.json.
        files: the weights; the inner widths of SwiGLU are what they have.

    Raises:
        ModelError: a size is missing, or the model computes what this package does not.
    """
    if args.get("cross_attn_all_layers_encoder", False) and _size(args, "n_layers_local_encoder") > 1:
        raise ModelError("cross_attn_all_layers_encoder is true; of the released layouts, only false is read.")
    window = _window(args, "local_attention_window_len")
    everywhere = args.get("cross_attn_all_layers_decoder", False)
    return BLTConfig(
        encoder=_part(args, "_local_encoder", files, "local_encoder.layers.0", window),
        latent=_part(args, "_global", files, "global_transformer.layers.0", None),
        decoder=_part(args, "_local_decoder", files, "local_decoder.layers.0", window),
        cross_attention=CrossAttentionConfig(
            num_heads=args.get("cross_attn_nheads") or _size(args, "n_heads_local_encoder"),
            k=_size(args, "cross_attn_k"),
            encoder_placement=Placement.LAST,
            decoder_placement=Placement.ALL if everywhere else Placement.FIRST,
        ),
        hash_embedding=HashEmbeddingConfig(
            ngram_sizes=tuple(args.get("encoder_hash_byte_group_size") or ()),
            num_functions=args.get("encoder_hash_byte_group_nb_functions", 1),
            table_size=_size(args, "encoder_hash_byte_group_vocab"),
        ),
    )


def patching_of(patcher_args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The patch scheme that `patcher_args` name, in blt-patcher's JSON form; None if it is not by entropy."""
    if patcher_args.get("patching_mode", "entropy") != "entropy" or "threshold" not in patcher_args:
        return None
    threshold, rise = float(patcher_args["threshold"]), patcher_args.get("threshold_add")
    fields: dict[str, Any] = {"version": 1, "max_patch_length": patcher_args.get("max_patch_length")}
    if patcher_args.get("monotonicity"):
        return {"scheme": "entropy-monotonic", **fields, "relative_threshold": threshold}
    if rise:
        return {"scheme": "entropy-combined", **fields, "threshold": threshold, "relative_threshold": float(rise)}
    return {"scheme": "entropy", **fields, "threshold": threshold}


def _size(args: Mapping[str, Any], key: str) -> int:
    value = args.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ModelError(f"{key} is {value!r}; a whole number is needed.")
    return int(value)


def _window(args: Mapping[str, Any], key: str) -> int:
    return _size(args, key) if args.get(key) is not None else _WINDOW


def _part(
    args: Mapping[str, Any], suffix: str, files: TensorFiles, layer: str, window: int | None
) -> TransformerConfig:
    gate = f"{layer}.{NAMES.feed_forward[0]}.weight"
    if gate not in files.tensors:
        raise ModelError(f"the weights lack {gate}; they are not in the released layout.")
    kv_heads = args.get("n_kv_heads_global") if suffix == "_global" else args.get("n_kv_heads")
    return TransformerConfig(
        dim=_size(args, f"dim{suffix}"),
        num_layers=_size(args, f"n_layers{suffix}"),
        num_heads=_size(args, f"n_heads{suffix}"),
        num_kv_heads=kv_heads,
        ffn_dim=files.tensors[gate].shape[0],
        window=window,
        rope_theta=float(args.get("rope_theta", _ROPE_THETA)),
        norm_eps=float(args.get("norm_eps", 1e-5)),
    ).in_shortest_form()
