"""The Byte Latent Transformer over packed documents.

Bytes pass through the local encoder, whose cross-attention condenses every patch into K vectors; the latent
transformer runs over patches; the local decoder predicts the next byte at every position from the encoder's byte state
and the latent output of the patch before the one that holds that next byte.

Legend: T tokens, D documents, P patches, K vectors of a patch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blt_model.attention import AttentionBackend
from blt_model.config import BLTConfig, Placement, Pooling, TransformerConfig
from blt_model.cross_attention import BytesReadPatches, CrossAttention, PatchesReadBytes
from blt_model.errors import ModelError
from blt_model.hash_embedding import HashEmbedding
from blt_model.initialization import initialize_blocks, initialize_linear, truncated_normal
from blt_model.layers import Block, RMSNorm, SequenceLayout, compute_dtype, document_positions, make_layout
from blt_model.packed import PackedBatch
from blt_model.segments import Segments, segment_max, segment_mean
from blt_model.vocabulary import VOCABULARY_SIZE
from blt_model.weightless import Embedding, Linear


def _placed(placement: Placement, num_layers: int) -> list[int]:
    """Layers of a stack that have cross-attention."""
    if placement == Placement.ALL:
        return list(range(num_layers))
    return [0 if placement == Placement.FIRST else num_layers - 1]


class LocalEncoder(nn.Module):
    """Bytes to byte states and patches."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        local, cross = config.encoder, config.cross_attention
        self.config = config
        self.embedding = Embedding(VOCABULARY_SIZE, local.dim)
        has_hashes = bool(config.hash_embedding.ngram_sizes)
        self.hash_embedding = HashEmbedding(config.hash_embedding, local.dim) if has_hashes else None
        self.blocks = nn.ModuleList(Block(local) for _ in range(local.num_layers))
        self.patch_projection = Linear(local.dim, config.patch_dim)
        self.cross_attention = nn.ModuleDict(
            {
                str(layer): PatchesReadBytes(cross, local.dim, local.norm_eps)
                for layer in _placed(cross.encoder_placement, local.num_layers)
            }
        )

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Byte embeddings plus hash n-gram embeddings.

        Args:
            tokens: int64 [T].
            positions: int64 [T], the place of each token in its document.

        Returns:
            [T, dim].
        """
        x: Tensor = self.embedding(tokens)
        if self.hash_embedding is not None:
            x = x + self.hash_embedding(tokens, positions)
            if self.config.hash_embedding.average:
                x = x / (1 + self.config.hash_embedding.num_tables)
        return x

    def forward(self, x: Tensor, layout: SequenceLayout, segments: Segments) -> tuple[Tensor, Tensor]:
        """Run the stack.

        Args:
            x: [T, dim] embeddings.
            layout: of the bytes.
            segments: the patch that holds each byte.

        Returns:
            Byte states [T, dim] and patches [P, K * dim].
        """
        patches: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            x = block(x, layout)
            if str(layer) in self.cross_attention:
                if patches is None:
                    patches = self.initial_patches(x, segments)
                patches = self.cross_attention[str(layer)](patches, x, segments)
        if patches is None:
            raise RuntimeError("the local encoder has no cross-attention layer")
        return x, patches.flatten(1)

    def initial_patches(self, x: Tensor, segments: Segments) -> Tensor:
        """The vectors of every patch before they read its bytes.

        Args:
            x: [T, dim] byte states after the first layer with cross-attention.
            segments: the patch that holds each byte.

        Returns:
            [P, K, dim].
        """
        pool = segment_max if self.config.cross_attention.pooling == Pooling.MAX else segment_mean
        projected: Tensor = self.patch_projection(pool(x, segments))
        return projected.view(segments.count, self.config.cross_attention.k, -1)


class LatentTransformer(nn.Module):
    """Patches to latent outputs."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        projection = Linear(config.patch_dim, config.latent.dim)
        self.projection = projection if config.projects_patches else None
        self.blocks = nn.ModuleList(Block(config.latent) for _ in range(config.latent.num_layers))

    def forward(self, patches: Tensor, layout: SequenceLayout) -> Tensor:
        """Run the stack.

        Args:
            patches: [P, K * local width].
            layout: of the patches.

        Returns:
            [P, latent width].
        """
        x = patches if self.projection is None else self.projection(patches)
        for block in self.blocks:
            x = block(x, layout)
        return x


class LocalDecoder(nn.Module):
    """Byte states and latent outputs to logits."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        local, cross = config.decoder, config.cross_attention
        self.vectors = cross.k
        self.patch_projection = Linear(config.latent.dim, config.patch_dim)
        self.blocks = nn.ModuleList(Block(local) for _ in range(local.num_layers))
        self.cross_attention = nn.ModuleDict(
            {
                str(layer): BytesReadPatches(cross, local.dim, local.norm_eps)
                for layer in _placed(cross.decoder_placement, local.num_layers)
            }
        )
        self.norm = RMSNorm(local.dim, local.norm_eps)
        self.head = Linear(local.dim, VOCABULARY_SIZE)

    def forward(self, x: Tensor, latents: Tensor, layout: SequenceLayout, segments: Segments) -> Tensor:
        """Run the stack.

        Args:
            x: [T, dim] the encoder's byte states.
            latents: [P, latent width].
            layout: of the bytes.
            segments: the patch whose latent output each byte reads.

        Returns:
            Logits [T, V].
        """
        projected: Tensor = self.patch_projection(latents)
        patches = projected.view(len(projected), self.vectors, -1)
        for layer, block in enumerate(self.blocks):
            if str(layer) in self.cross_attention:
                x = self.cross_attention[str(layer)](x, patches, segments)
            x = block(x, layout)
        logits: Tensor = self.head(self.norm(x))
        return logits


def latent_offsets(batch_patch_offsets: Tensor, document_offsets: Tensor) -> Tensor:
    """Document offsets counted in patches; the empty patches at the end make one more document.

    Args:
        batch_patch_offsets: int32 [P + 1].
        document_offsets: int32 [D + 1].

    Returns:
        int32 [D + 2], the last equal to P.
    """
    offsets = torch.searchsorted(batch_patch_offsets, document_offsets, out_int32=True)
    return torch.nn.functional.pad(offsets, (0, 1), value=batch_patch_offsets.shape[0] - 1)


class BLT(nn.Module):
    """The Byte Latent Transformer."""

    def __init__(self, config: BLTConfig, *, attention_backend: AttentionBackend | str = AttentionBackend.AUTO) -> None:
        """Build the model with fresh weights.

        Args:
            config: its architecture.
            attention_backend: "auto", "varlen", "triton", "flex" or "sdpa"; a plain attribute, free to change later.
        """
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.encoder = LocalEncoder(config)
        self.latent = LatentTransformer(config)
        self.decoder = LocalDecoder(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill all weights afresh from torch's random generator.

        The hash tables start small: a row that training never visits should add next to nothing.
        """
        encoder, latent, decoder = self.encoder, self.latent, self.decoder
        std = self.config.encoder.dim**-0.5
        truncated_normal(encoder.embedding, std)
        if encoder.hash_embedding is not None:
            truncated_normal(encoder.hash_embedding, std / (1 + self.config.hash_embedding.num_tables))
        for part in (encoder, latent, decoder):
            initialize_blocks(block for block in part.blocks if isinstance(block, Block))
        for local in (encoder, decoder):
            initialize_linear(local.patch_projection)
            for cross in local.cross_attention.values():
                if isinstance(cross, CrossAttention):
                    cross.reset_parameters(len(local.blocks))
        if latent.projection is not None:
            initialize_linear(latent.projection)
        nn.init.ones_(decoder.norm.weight)
        initialize_linear(decoder.head)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits of the token after each position.

        Args:
            batch: tokens, document offsets, patch offsets and decoder patches.

        Returns:
            [T, V] in the dtype that the last layer computes in.

        Raises:
            ModelError: the batch has no patches.
        """
        if batch.patch_offsets is None or batch.decoder_patch is None:
            raise ModelError("the batch has no patches; a blt needs patch_offsets and decoder_patch.")
        config, length = self.config, len(batch.tokens)
        num_patches = batch.patch_offsets.shape[0] - 1
        x = self.encoder.embed(batch.tokens, document_positions(batch.document_offsets, length))
        if x.is_cuda:
            # Under autocast the residual stream is in half precision too: float32 doubles what all but products must
            # move. CPUs compute in float32 within, and converting to and fro costs them more than that saves.
            x = x.to(compute_dtype(x))
        encoder_layout = self._byte_layout(config.encoder, batch, x)
        x, patches = self.encoder(x, encoder_layout, Segments.from_offsets(batch.patch_offsets, length))
        latent_layout = make_layout(
            config.latent,
            latent_offsets(batch.patch_offsets, batch.document_offsets),
            patches,
            backend=self.attention_backend,
            max_length=batch.max_document_patches,
        )
        latents = self.latent(patches, latent_layout)
        decoder_layout = encoder_layout
        if _layout_key(config.decoder) != _layout_key(config.encoder):
            decoder_layout = self._byte_layout(config.decoder, batch, x)
        reads = Segments.from_ids(batch.decoder_patch, num_patches)
        logits: Tensor = self.decoder(x, latents, decoder_layout, reads)
        return logits

    def _byte_layout(self, config: TransformerConfig, batch: PackedBatch, x: Tensor) -> SequenceLayout:
        return make_layout(
            config,
            batch.document_offsets,
            x,
            backend=self.attention_backend,
            max_length=batch.max_document_tokens,
        )


def _layout_key(config: TransformerConfig) -> tuple[int | None, float, int]:
    """What a layout depends on, besides the batch."""
    return config.window, config.rope_theta, config.head_dim
