"""Prompts through the models in one packed forward, leaving behind what the following steps need.

Legend: R texts, T tokens of all of them, V vocabulary, K vectors of a patch, P complete patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM, next_byte_entropy
from blt_model.config import TransformerConfig
from blt_model.generation.patching import Starts
from blt_model.layers import Block, SequenceLayout, make_layout
from blt_model.segments import Segments

Ints = npt.NDArray[np.int64]

ENTROPY_TOKENS = 16_384
"""Positions whose entropies are computed at once."""


class Filler(Protocol):
    """Takes the keys and values of a stack, layer by layer."""

    def take(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take [T, G, E] rotated keys and values of a layer."""
        ...


class PatchSink(Protocol):
    """Takes what a BLT's forward leaves for later steps."""

    encoder: Filler
    latent: Filler
    decoder: Filler

    def take_open_bytes(self, layer: int, states: Tensor) -> None:
        """Take the byte states [T, dim] after the encoder's layer-th cross-attention layer (counted among those)."""
        ...

    def take_latents(self, latents: Tensor) -> None:
        """Take the latent outputs [R, width] of every text's last complete patch."""
        ...


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """Texts end to end, without their end."""

    tokens: Tensor
    """int64 [T] each text BOS first."""
    host_tokens: Ints
    """int64 [T] the same on the host."""
    lengths: Ints
    """int64 [R], each at least 1."""
    offsets: Tensor
    """int32 [R + 1] where each begins."""

    @classmethod
    def pack(cls, texts: Sequence[Sequence[int]], device: torch.device) -> PackedTexts:
        """Lay token ids end to end on a device."""
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        tokens = np.fromiter(itertools.chain.from_iterable(texts), dtype=np.int64, count=int(lengths.sum()))
        return cls(torch.from_numpy(tokens).to(device), tokens, lengths, _device_offsets(lengths, device))

    def contexts(self, start_id: int | None) -> PackedTexts:
        """The same tokens, cut also before every token that begins a context of its own; None cuts nowhere else."""
        if start_id is None:
            return self
        starts = np.union1d(self.starts, np.flatnonzero(self.host_tokens == start_id))
        lengths = np.diff(starts, append=len(self.host_tokens))
        return PackedTexts(self.tokens, self.host_tokens, lengths, _device_offsets(lengths, self.tokens.device))

    @property
    def starts(self) -> Ints:
        """int64 [R] the places of the texts' first tokens."""
        return offsets_of(self.lengths)[:-1]

    @property
    def ends(self) -> Ints:
        """int64 [R] the places after the texts' last tokens."""
        return np.cumsum(self.lengths)

    def layout(self, config: TransformerConfig, x: Tensor, backend: str) -> SequenceLayout:
        """The layout of a stack over the tokens."""
        return make_layout(config, self.offsets, x, backend=backend, max_length=int(self.lengths.max()))


@dataclass(frozen=True, slots=True)
class TextPatches:
    """The patches of packed texts, those that the last token leaves open told from the complete ones."""

    byte_patch: Ints
    """int64 [T] the patch that holds each token, among all."""
    complete: Ints
    """int64 [P] the complete patches among all."""
    complete_counts: Ints
    """int64 [R] complete patches of each text, at least 1."""
    decoder_patch: Ints
    """int64 [T] what each position reads, among the complete ones."""
    open_lengths: Ints
    """int64 [R] tokens in the open patch of each text; 0 where the next token starts one."""

    @classmethod
    def of(cls, starts: Sequence[Starts]) -> TextPatches:
        """Read them from where patches start, bool [tokens + 1] of each text."""
        totals = np.array([int(row[:-1].sum()) for row in starts])
        is_open = np.array([not row[-1] for row in starts])
        counts = totals - is_open
        bases, complete_bases = offsets_of(totals)[:-1], offsets_of(counts)[:-1]
        patch = [row.cumsum() - 1 for row in starts]
        return cls(
            byte_patch=np.concatenate([base + row[:-1] for base, row in zip(bases, patch, strict=True)]),
            complete=np.concatenate([base + np.arange(count) for base, count in zip(bases, counts, strict=True)]),
            complete_counts=counts,
            decoder_patch=np.concatenate([base + row[1:] - 1 for base, row in zip(complete_bases, patch, strict=True)]),
            open_lengths=np.array([len(row) - 1 - int(np.flatnonzero(row)[-1]) for row in starts]),
        )


def offsets_of(lengths: Ints) -> Ints:
    """int64 [n + 1] offsets of runs of these lengths, int64 [n]."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def _device_offsets(lengths: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(offsets_of(lengths).astype(np.int32)).to(device)


def run_stack(blocks: Iterable[object], x: Tensor, layout: SequenceLayout, filler: Filler | None) -> Tensor:
    """Run a stack of blocks over packed positions, handing on keys and values."""
    for layer, block in enumerate(blocks):
        x = _run(block, x, layout, layer, filler)
    return x


def _run(block: object, x: Tensor, layout: SequenceLayout, layer: int, filler: Filler | None) -> Tensor:
    if not isinstance(block, Block):
        raise TypeError("blocks hold Block modules")
    x, key, value = block.stream(x, layout, None)
    if filler is not None:
        filler.take(layer, key, value)
    return x


def prefill_byte_lm(model: ByteLM, texts: PackedTexts, filler: Filler | None) -> Tensor:
    """Run texts through a byte LM.

    Args:
        model: on the texts' device.
        texts: R of them.
        filler: takes keys and values.

    Returns:
        [T, dim] the trunk's output.
    """
    x: Tensor = model.embedding(texts.tokens)
    return run_stack(model.blocks, x, texts.layout(model.config.transformer, x, str(model.attention_backend)), filler)


def entropies_of(model: ByteLM, texts: PackedTexts, context_start: int | None, filler: Filler | None) -> list[float]:
    """Entropies in nats after every token, with the head in float32.

    Args:
        model: on the texts' device.
        texts: R of them.
        context_start: the token that begins a context of its own, as every text does; None for none.
        filler: takes keys and values.
    """
    states = prefill_byte_lm(model, texts.contexts(context_start), filler)
    pieces = [next_byte_entropy(model.wide_logits(piece)) for piece in torch.split(states, ENTROPY_TOKENS)]
    values: list[float] = torch.cat(pieces).tolist()
    return values


def prefill_blt(model: BLT, texts: PackedTexts, patches: TextPatches, wanted: Ints, sink: PatchSink | None) -> Tensor:
    """Run texts through a BLT; the latent transformer sees their complete patches only.

    Args:
        model: on the texts' device.
        texts: R of them.
        patches: of the texts.
        wanted: int64 [N] the places whose logits are asked for.
        sink: takes keys, values and open bytes.

    Returns:
        Logits [N, V].
    """
    device, backend = texts.tokens.device, str(model.attention_backend)
    offsets = texts.offsets.long()
    positions = torch.arange(len(texts.tokens), device=device) - offsets[:-1].repeat_interleave(offsets.diff())
    x = model.encoder.embed(texts.tokens, positions)
    layout = texts.layout(model.config.encoder, x, backend)
    x, vectors = _encode(model, x, layout, patches, sink)
    counts = _device_offsets(patches.complete_counts, device)
    kept = vectors.flatten(1)[torch.from_numpy(patches.complete).to(device)]
    latents = kept if model.latent.projection is None else model.latent.projection(kept)
    longest = int(patches.complete_counts.max())
    latent_layout = make_layout(model.config.latent, counts, latents, backend=backend, max_length=longest)
    latents = run_stack(model.latent.blocks, latents, latent_layout, None if sink is None else sink.latent)
    if sink is not None:
        sink.take_latents(latents[counts[1:].long() - 1])
    return _decode(model, x, latents, texts, patches, torch.from_numpy(wanted).to(device), sink)


def _encode(
    model: BLT, x: Tensor, layout: SequenceLayout, patches: TextPatches, sink: PatchSink | None
) -> tuple[Tensor, Tensor]:
    """Byte states [T, dim], and the vectors [all patches, K, dim]."""
    encoder = model.encoder
    segments = Segments.from_ids(torch.from_numpy(patches.byte_patch).to(x.device), int(patches.byte_patch[-1]) + 1)
    vectors: Tensor | None = None
    for layer, block in enumerate(encoder.blocks):
        x = _run(block, x, layout, layer, None if sink is None else sink.encoder)
        if str(layer) not in encoder.cross_attention:
            continue
        if sink is not None:
            sink.take_open_bytes(list(encoder.cross_attention).index(str(layer)), x)
        if vectors is None:
            vectors = encoder.initial_patches(x, segments)
        vectors = encoder.cross_attention[str(layer)](vectors, x, segments)
    if vectors is None:
        raise RuntimeError("the local encoder has no cross-attention layer")
    return x, vectors


def _decode(
    model: BLT,
    x: Tensor,
    latents: Tensor,
    texts: PackedTexts,
    patches: TextPatches,
    wanted: Tensor,
    sink: PatchSink | None,
) -> Tensor:
    """Logits [N, V] at the wanted places."""
    decoder = model.decoder
    projected: Tensor = decoder.patch_projection(latents)
    vectors = projected.view(len(projected), decoder.vectors, -1)
    segments = Segments.from_ids(torch.from_numpy(patches.decoder_patch).to(x.device), len(vectors))
    layout = texts.layout(model.config.decoder, x, str(model.attention_backend))
    for layer, block in enumerate(decoder.blocks):
        if str(layer) in decoder.cross_attention:
            x = decoder.cross_attention[str(layer)](x, vectors, segments)
        x = _run(block, x, layout, layer, None if sink is None else sink.decoder)
    logits: Tensor = decoder.head(decoder.norm(x[wanted]))
    return logits
