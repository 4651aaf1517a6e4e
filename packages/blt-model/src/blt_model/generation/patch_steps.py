"""Patches as they become complete: what holds their bytes until then, and the latent transformer's steps.

Legend: B rows, m rows that complete a patch, S bytes of the longest of those patches, K vectors of a patch, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.blt import BLT
from blt_model.caches import AttentionCache, AttentionStep, CacheFiller
from blt_model.cross_attention import CrossAttention
from blt_model.generation import fused
from blt_model.generation.prefill import Filler, PackedTexts, TextPatches, offsets_of
from blt_model.generation.resident import Parts
from blt_model.generation.steps import BlockStep, CrossStep, block_steps, pool_patches


class PatchSteps:
    """Open patches, the latent transformer's cache, and what the decoder reads of the newest complete patches."""

    def __init__(self, model: BLT, rows: int, *, open_capacity: int = 32, is_fused: bool = False) -> None:
        """Make room.

        Args:
            model: whose weights are used as they lie.
            rows: B.
            open_capacity: bytes of an open patch at first; doubles when one grows longer.
            is_fused: run the kernels of `fused`, which must be available, from static plans only.
        """
        config, weight = model.config, model.encoder.embedding.weight
        encoder, decoder = model.encoder, model.decoder
        self._config, self._decoder_projection = config, decoder.patch_projection.weight
        self._pool_projection = encoder.patch_projection.weight
        projection = model.latent.projection
        self._latent_projection = None if projection is None else projection.weight
        self._encoder_cross = cross_steps(encoder.cross_attention)
        self._decoder_cross = cross_steps(decoder.cross_attention)
        blocks = block_steps(model.latent.blocks)
        self._blocks: Sequence[BlockStep | fused.FusedBlock] = fused.block_steps(blocks) if is_fused else blocks
        self._patch_keys = fused.PatchKeys(self._decoder_cross) if is_fused else None
        self.latent = AttentionCache(config.latent, rows, dtype=weight.dtype, device=weight.device)
        self._stack = fused.resident_stack(Parts(blocks=blocks, caches=[self.latent])) if is_fused else None
        self.open_bytes = weight.new_zeros((len(self._encoder_cross), rows, open_capacity, config.encoder.dim))
        """[encoder layers with cross-attention, B, capacity, dim] byte states of open patches."""
        heads = config.cross_attention.num_heads
        shape = (len(self._decoder_cross), rows, heads, config.cross_attention.k, config.encoder.dim // heads)
        self.keys = weight.new_zeros(shape)
        self.values = weight.new_zeros(shape)
        """[decoder layers with cross-attention, B, H, K, E] of every row's newest complete patch."""
        self._absorption: fused.Absorption | None = None

    @property
    def open_capacity(self) -> int:
        """Bytes that an open patch may hold."""
        return self.open_bytes.shape[2]

    def reserve_open(self, length: int) -> bool:
        """Make room for open patches of so many bytes; returns whether the buffer was replaced."""
        if length <= self.open_capacity:
            return False
        old = self.open_bytes
        self.open_bytes = old.new_zeros((*old.shape[:2], max(2 * self.open_capacity, length), old.shape[3]))
        self.open_bytes[:, :, : old.shape[2]] = old
        return True

    def put_open(self, index: int, slots: Tensor, states: Tensor) -> None:
        """Add a byte to open patches.

        Args:
            index: of the cross-attention layer, counted among those.
            slots: int64 [n] the places, in a layer's open bytes seen as [B * capacity, dim].
            states: [n, dim].
        """
        self.open_bytes[index].view(-1, states.shape[1]).index_copy_(0, slots, states)

    def complete(self, rows: Tensor, step: AttentionStep | fused.FusedStep, longest: int, mask: Tensor | None) -> None:
        """Run the patches of some rows through the latent transformer.

        Args:
            rows: int64 [m].
            step: planned on the latent cache for the same rows.
            longest: S.
            mask: bool [m, S] of the bytes that each patch has; None for all.
        """
        self._run(rows, self._encode(step.rows, longest, mask), step)

    def complete_one(self, rows: Tensor, step: fused.FusedStep, longest: int, lengths: Tensor) -> None:
        """Do the same for the one row that there is, by kernels of `fused`.

        Args:
            rows: int64 [1] nought.
            step: planned on the latent cache.
            longest: S.
            lengths: int64 [1] bytes of the patch.
        """
        held = self.open_bytes[:, 0, :longest]
        readers = [fused.PatchReader(*of_layer) for of_layer in zip(self._encoder_cross, held, strict=True)]
        if not readers:
            raise RuntimeError("the local encoder has no cross-attention layer")
        pooled = fused.pooled(held[0], lengths, self._pool_projection, self._config.cross_attention.pooling)
        vectors = pooled.view(self._config.cross_attention.k, -1)
        for reader in readers:
            vectors = reader(vectors, lengths)
        self._run(rows, vectors[None], step)

    def _run(self, rows: Tensor, vectors: Tensor, step: AttentionStep | fused.FusedStep) -> None:
        """Run vectors [m, K, dim] through the latent transformer, for the decoder to read."""
        x = vectors.flatten(1)
        if self._latent_projection is not None:
            x = F.linear(x, self._latent_projection)
        if self._stack is not None and isinstance(step, fused.FusedStep):
            x = self._stack(x.contiguous(), step.positions, step.programs)
        else:
            for layer, block in enumerate(self._blocks):
                x = block(x, self.latent, layer, step)  # type: ignore[arg-type]  # blocks and plans are of one kind
        self.put_latents(rows, x)

    def _encode(self, rows: Tensor | int | None, longest: int, mask: Tensor | None) -> Tensor:
        """The vectors [m, K, dim] of the rows' open patches."""
        vectors: Tensor | None = None
        wide_mask = None if mask is None else mask[:, None, None]
        for index, cross in enumerate(self._encoder_cross):
            held = self.open_bytes[index, :, :longest]
            states = held[rows : rows + 1] if isinstance(rows, int) else held if rows is None else held[rows]
            if vectors is None:
                pooled = pool_patches(states, mask, self._config.cross_attention.pooling)
                projected = F.linear(pooled, self._pool_projection)
                vectors = projected.view(len(pooled), self._config.cross_attention.k, -1)
            vectors = cross(vectors, *cross.keys_values(states), wide_mask)
        if vectors is None:
            raise RuntimeError("the local encoder has no cross-attention layer")
        return vectors

    def put_latents(self, rows: Tensor, latents: Tensor) -> None:
        """Make latent outputs [m, width] those that rows, int64 [m], read from now on."""
        shape = len(latents), self._config.cross_attention.k, -1
        if self._patch_keys is not None:
            vectors = fused.mapped(latents, self._decoder_projection).view(shape)
            if self._absorption is not None:
                self._absorption(self._patch_keys.of_one(vectors[0]))
                return
            keys, values = self._patch_keys(vectors)
            self.keys.index_copy_(1, rows, keys)
            self.values.index_copy_(1, rows, values)
            return
        vectors = F.linear(latents, self._decoder_projection).view(shape)
        for index, cross in enumerate(self._decoder_cross):
            keys, values = cross.keys_values(vectors)
            self.keys[index].index_copy_(0, rows, keys)
            self.values[index].index_copy_(0, rows, values)

    def read(self, index: int, x: Tensor) -> Tensor:
        """Let the bytes [n, dim] of the first n rows read, in the decoder's index-th layer with cross-attention."""
        count = len(x)
        cross = self._decoder_cross[index]
        if self._patch_keys is not None:
            return fused.read_patches(cross, x, self.keys[index], self.values[index])
        return cross(x[:, None], self.keys[index, :count], self.values[index, :count]).squeeze(1)

    def decoder_parts(self, blocks: Sequence[BlockStep], cache: AttentionCache, layers: dict[int, int]) -> Parts:
        """The decoder as a stack; if it can be resident, patches are from now on held as that reads them, and only so.

        Args:
            blocks: its blocks.
            cache: its cache.
            layers: those with cross-attention, each with its place among them.
        """
        crosses = {layer: self._decoder_cross[index] for layer, index in layers.items()}
        parts = Parts(blocks=blocks, caches=[cache], crosses=crosses)
        if cache.rows > 1 or not crosses:
            return parts
        absorption = fused.Absorption(self._decoder_cross, self._config.cross_attention.k)
        absorbing = replace(parts, patch=absorption.patch)
        if not fused.can_be_resident(absorbing):
            return parts
        self._absorption = absorption
        return absorbing

    def copy_row(self, source: int, target: int, *, patches: int, open_length: int) -> None:
        """Copy a row over another.

        Args:
            source: the row.
            target: the other.
            patches: complete patches of the row.
            open_length: bytes in its open patch.
        """
        self.latent.copy_row(source, target, patches)
        self.open_bytes[:, target, :open_length] = self.open_bytes[:, source, :open_length]
        for buffer in (self.keys, self.values):
            buffer[:, target] = buffer[:, source]


class BLTFiller:
    """Takes what a BLT's forward over prompts leaves for the steps; see `prefill.PatchSink`."""

    def __init__(
        self,
        steps: PatchSteps,
        caches: tuple[AttentionCache, AttentionCache],
        first_row: int,
        texts: PackedTexts,
        patches: TextPatches,
    ) -> None:
        """Plan the copies.

        Args:
            steps: take latents and open bytes.
            caches: the encoder's and the decoder's.
            first_row: the row of the first text; the others follow it.
            texts: the prompts.
            patches: theirs.
        """
        self._steps, self._first_row, self._texts, self._patches = steps, first_row, texts, patches
        self.encoder: Filler = CacheFiller(caches[0], first_row, texts.starts, texts.lengths)
        self.decoder: Filler = CacheFiller(caches[1], first_row, texts.starts, texts.lengths)
        counts = patches.complete_counts
        self.latent: Filler = CacheFiller(steps.latent, first_row, offsets_of(counts)[:-1], counts)
        steps.reserve_open(int(patches.open_lengths.max()) + 1)

    def take_open_bytes(self, layer: int, states: Tensor) -> None:
        """Take the byte states [T, dim] after a layer with cross-attention."""
        for text, (end, length) in enumerate(zip(self._texts.ends, self._patches.open_lengths, strict=True)):
            self._steps.open_bytes[layer, self._first_row + text, :length] = states[end - length : end]

    def take_latents(self, latents: Tensor) -> None:
        """Take the latent outputs [R, width] of every text's last complete patch."""
        rows = torch.arange(self._first_row, self._first_row + len(latents), device=latents.device)
        self._steps.put_latents(rows, latents)


def cross_steps(modules: torch.nn.ModuleDict) -> list[CrossStep]:
    """The parameters of a local model's cross-attentions, in the order of its layers."""
    return [CrossStep.of(module) for module in modules.values() if isinstance(module, CrossAttention)]
