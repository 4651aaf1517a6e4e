"""Where each of our tensors is in a foreign checkpoint.

Foreign formats keep apart what we keep as one matrix (queries, keys and values; gate and value; hash tables), always
one below the other: each of our tensors is some of theirs, joined along the first dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from blt_model.config import BLTConfig, ByteLMConfig, Placement, TransformerConfig


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one of our tensors."""

    name: str
    """Of the foreign tensor."""
    rows: int | None = None
    """How many; None for all."""


#: Our tensor's name to its pieces, from the first row to the last.
Pieces = Mapping[str, tuple[Piece, ...]]


@dataclass(frozen=True, slots=True)
class Names:
    """How a foreign format calls things. `{i}` stands for a layer or a table."""

    attention: tuple[str, str, str, str]
    """Query, key, value, output."""
    attention_norm: str
    feed_forward: tuple[str, str, str]
    """Gate, value, output."""
    feed_forward_norm: str
    cross: tuple[str, str, str, str]
    """Query, key, value, output of cross-attention."""
    cross_query_norm: str
    cross_key_norm: str
    embedding: str
    encoder: str
    """Beginning of the local encoder's names, with its full stop; likewise below."""
    latent: str
    decoder: str
    decoder_head: str
    """Full name without `.weight`."""
    hash_tables: str
    """Full name without `.weight`; with `{i}` if each table is a tensor."""
    byte_lm_head: str


def _block(names: Names, config: TransformerConfig, theirs: str, ours: str) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    query, key, value, output = names.attention
    key_rows, inner = config.kv_heads * config.head_dim, config.feed_forward_dim
    gate, up, down = names.feed_forward
    yield f"{ours}.attention_norm.weight", (Piece(f"{theirs}.{names.attention_norm}.weight"),)
    yield (
        f"{ours}.attention.query_key_value.weight",
        (
            Piece(f"{theirs}.{query}.weight", config.dim),
            Piece(f"{theirs}.{key}.weight", key_rows),
            Piece(f"{theirs}.{value}.weight", key_rows),
        ),
    )
    yield f"{ours}.attention.output.weight", (Piece(f"{theirs}.{output}.weight"),)
    yield f"{ours}.feed_forward_norm.weight", (Piece(f"{theirs}.{names.feed_forward_norm}.weight"),)
    yield (
        f"{ours}.feed_forward.gate_value.weight",
        (Piece(f"{theirs}.{gate}.weight", inner), Piece(f"{theirs}.{up}.weight", inner)),
    )
    yield f"{ours}.feed_forward.output.weight", (Piece(f"{theirs}.{down}.weight"),)


def _cross(names: Names, dim: int, theirs: str, ours: str) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    query, key, value, output = names.cross
    yield f"{ours}.query_norm.weight", (Piece(f"{theirs}.{names.cross_query_norm}.weight"),)
    yield f"{ours}.key_norm.weight", (Piece(f"{theirs}.{names.cross_key_norm}.weight"),)
    yield f"{ours}.query.weight", (Piece(f"{theirs}.{query}.weight"),)
    yield (
        f"{ours}.key_value.weight",
        (Piece(f"{theirs}.{key}.weight", dim), Piece(f"{theirs}.{value}.weight", dim)),
    )
    yield f"{ours}.output.weight", (Piece(f"{theirs}.{output}.weight"),)


def byte_lm_pieces(names: Names, config: ByteLMConfig, prefix: str = "") -> Pieces:
    """Where the entropy model's tensors are.

    Args:
        names: of the foreign format.
        config: of the model.
        prefix: of all foreign names, with its full stop.
    """
    pieces: dict[str, tuple[Piece, ...]] = {
        "embedding.weight": (Piece(f"{prefix}{names.embedding}.weight"),),
        "norm.weight": (Piece(f"{prefix}norm.weight"),),
        "head.weight": (Piece(f"{prefix}{names.byte_lm_head}.weight"),),
    }
    for layer in range(config.transformer.num_layers):
        pieces |= dict(_block(names, config.transformer, f"{prefix}layers.{layer}", f"blocks.{layer}"))
    return pieces


def blt_pieces(names: Names, config: BLTConfig, *, encoder_cross_layer: int = 0) -> Pieces:
    """Where a BLT's tensors are.

    Args:
        names: of the foreign format.
        config: of the model: cross-attention in the encoder's last layer, and in the decoder's first or all.
        encoder_cross_layer: index, in the foreign encoder, of the one cross-attention that counts.
    """
    dim, cross = config.encoder.dim, config.cross_attention
    pieces: dict[str, tuple[Piece, ...]] = {
        "encoder.embedding.weight": (Piece(f"{names.encoder}{names.embedding}.weight"),),
        "encoder.patch_projection.weight": (Piece(f"{names.encoder}patch_embedding_projection.weight"),),
        "decoder.patch_projection.weight": (Piece(f"{names.decoder}patch_embedding_projection.weight"),),
        "decoder.norm.weight": (Piece(f"{names.decoder}norm.weight"),),
        "decoder.head.weight": (Piece(f"{names.decoder_head}.weight"),),
    }
    tables = config.hash_embedding
    if "{i}" in names.hash_tables:
        pieces["encoder.hash_embedding.weight"] = tuple(
            Piece(f"{names.hash_tables.format(i=table)}.weight", tables.table_size)
            for table in range(tables.num_tables)
        )
    else:
        pieces["encoder.hash_embedding.weight"] = (Piece(f"{names.hash_tables}.weight"),)
    if config.projects_patches:
        pieces["latent.projection.weight"] = (Piece(f"{names.latent}token_embedding_projection.weight"),)
    last = config.encoder.num_layers - 1
    theirs = f"{names.encoder}cross_attn_layers.{encoder_cross_layer}"
    pieces |= dict(_cross(names, dim, theirs, f"encoder.cross_attention.{last}"))
    everywhere = cross.decoder_placement is Placement.ALL
    for layer in range(config.decoder.num_layers if everywhere else 1):
        theirs = f"{names.decoder}cross_attn_layers.{layer}"
        pieces |= dict(_cross(names, dim, theirs, f"decoder.cross_attention.{layer}"))
    for prefix, part, ours in (
        (names.encoder, config.encoder, "encoder"),
        (names.latent, config.latent, "latent"),
        (names.decoder, config.decoder, "decoder"),
    ):
        for layer in range(part.num_layers):
            pieces |= dict(_block(names, part, f"{prefix}layers.{layer}", f"{ours}.blocks.{layer}"))
    return pieces
