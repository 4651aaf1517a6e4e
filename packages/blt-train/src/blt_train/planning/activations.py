"""What a forward pass keeps for its backward pass, in bytes, by part, from the architecture alone.

The formulas follow the model's code tensor by tensor, as eager execution has them: what each operation saves, counted
once where two share it. A test holds them to the bytes that real forward passes leave alive, on the CPU and, with
tensors without content, on the path that CUDA takes where triton is installed. Compiled blocks keep less; they are
counted as eager, so that the figure is an upper bound.

Under autocast results of matrix products have the compute dtype, and so have residual streams (`HALF_STREAMS`); norms
read, and keep, float32.

Legend: T positions (tokens, or patches for the latent transformer), d width, f inner width of SwiGLU, H heads, E head
width, K vectors of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from blt_model import BLTConfig, ByteLMConfig
from blt_model import ModelConfig as ArchitectureConfig
from blt_model.config import Placement, Pooling, TransformerConfig
from blt_model.vocabulary import VOCABULARY_SIZE
from blt_train.config import ActivationCheckpointing

#: Whether `blt_model` casts the bytes' residual streams to the compute dtype under autocast, or leaves them in float32
#: as they come from the embedding; the patches' stream has the compute dtype either way.
HALF_STREAMS = True

_FLOAT32 = 4
_INT32 = 4
_INT64 = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationModel:
    """How a model computes, as far as its memory depends on it."""

    architecture: ArchitectureConfig
    """Of either model."""

    compute_bytes: int
    """Bytes of a number in matrix products: 2 for bfloat16, 4 for float32."""

    is_cpu: bool
    """The CPU's own norms and attention, and CUDA's kernels, keep less than what autograd asks for, each in its way."""

    def held(self, mode: ActivationCheckpointing, *, tokens: int, patches: int) -> dict[str, int]:
        """Return the bytes that one forward pass leaves for its backward pass, by part.

        Args:
            mode: what blocks recompute.
            tokens: of the micro batch, padding included.
            patches: of the micro batch, empty ones included; not read for the byte LM.
        """
        if isinstance(self.architecture, ByteLMConfig):
            return self._held_by_byte_lm(self.architecture, mode, tokens)
        return self._held_by_blt(self.architecture, mode, tokens, patches)

    def largest_block(self, *, tokens: int, patches: int) -> int:
        """Return the bytes that one block keeps where nothing is recomputed, of the block that keeps most.

        Args:
            tokens: of the micro batch.
            patches: of the micro batch.
        """
        return max(
            self._block(stack, ActivationCheckpointing.NONE, is_latent=is_latent) * (patches if is_latent else tokens)
            for stack, is_latent in self._stacks()
        )

    def backward_workspace(self, *, tokens: int, patches: int) -> int:
        """Return roughly the bytes of gradients of activations that live at once in one block's backward pass.

        Args:
            tokens: of the micro batch.
            patches: of the micro batch.
        """
        return max(
            (3 * self.compute_bytes * stack.feed_forward_dim + 2 * _FLOAT32 * stack.dim)
            * (patches if is_latent else tokens)
            for stack, is_latent in self._stacks()
        )

    def _stacks(self) -> Iterator[tuple[TransformerConfig, bool]]:
        """Yield every stack and whether its positions are patches."""
        if isinstance(self.architecture, ByteLMConfig):
            yield self.architecture.transformer, False
            return
        yield self.architecture.encoder, False
        yield self.architecture.latent, True
        yield self.architecture.decoder, False

    @property
    def _byte_stream(self) -> int:
        """Bytes of a number in the bytes' residual streams."""
        return self.compute_bytes if HALF_STREAMS else _FLOAT32

    def _block(self, stack: TransformerConfig, mode: ActivationCheckpointing, *, is_latent: bool) -> int:
        """Bytes per position that one block keeps, its input included."""
        stream = self.compute_bytes if is_latent else self._byte_stream
        if mode is ActivationCheckpointing.FULL:
            return stream * stack.dim
        width, compute = stack.dim, self.compute_bytes
        kv_width, inner = stack.kv_heads * stack.head_dim, stack.feed_forward_dim
        qkv, mixed, gates = compute * (width + 2 * kv_width), compute * width, compute * 2 * inner
        log_sums = _FLOAT32 * stack.num_heads
        if mode is ActivationCheckpointing.SELECTIVE:
            attention = mixed + log_sums
            # Of the four matrix products the last is not kept, nor the first on the CPU, which rotates it in place.
            products = (0 if self.is_cpu else qkv) + mixed + gates
            return stream * width + attention + products
        norms = 2 * (_FLOAT32 * width + _FLOAT32 + compute * width)
        # The kernel that splits heads takes widths that are powers of two; elsewhere both what was made and what was
        # rotated stay.
        is_split = self.is_cpu or stack.head_dim & (stack.head_dim - 1) == 0
        rotated = 0 if is_split else compute * (width + kv_width)
        return norms + qkv + rotated + mixed + log_sums + gates + compute * inner

    def _stack(self, stack: TransformerConfig, mode: ActivationCheckpointing, *, is_latent: bool = False) -> int:
        """Bytes per position of all blocks."""
        return stack.num_layers * self._block(stack, mode, is_latent=is_latent)

    def _layout(self, stack: TransformerConfig, mode: ActivationCheckpointing) -> int:
        """Bytes per position of what all blocks share: cosines and sines, and on CUDA which keys a query reads.

        On the CPU the former are complex numbers, and both where they are recomputed.
        """
        rotary = _FLOAT32 * stack.head_dim
        if not self.is_cpu:
            return rotary + 2 * _INT32
        return rotary if mode is ActivationCheckpointing.NONE else 2 * rotary

    def _head(self, width: int) -> int:
        """Bytes per token of the last norm, the logits and their gradient, which is made in the forward pass."""
        norm = _FLOAT32 * width + _FLOAT32 + self.compute_bytes * width
        return norm + 2 * self.compute_bytes * VOCABULARY_SIZE

    def _held_by_byte_lm(self, config: ByteLMConfig, mode: ActivationCheckpointing, tokens: int) -> dict[str, int]:
        stack = config.transformer
        return {
            "transformer": tokens * (self._stack(stack, mode) + self._layout(stack, mode)),
            "logits": tokens * self._head(stack.dim),
        }

    def _held_by_blt(
        self, config: BLTConfig, mode: ActivationCheckpointing, tokens: int, patches: int
    ) -> dict[str, int]:
        hashes = 2 * _INT64 * config.hash_embedding.num_tables if config.hash_embedding.ngram_sizes else 0
        shares_layout = (config.encoder.window, config.encoder.rope_theta, config.encoder.head_dim) == (
            config.decoder.window,
            config.decoder.rope_theta,
            config.decoder.head_dim,
        )
        latent = self._stack(config.latent, mode, is_latent=True) + self._layout(config.latent, mode)
        decoder = self._stack(config.decoder, mode)
        if not shares_layout:
            decoder += self._layout(config.decoder, mode)
        if config.projects_patches:
            latent += self.compute_bytes * config.patch_dim
        return {
            "embedding": tokens * hashes,
            "encoder": tokens * (self._stack(config.encoder, mode) + self._layout(config.encoder, mode)),
            "encoder_cross_attention": self._patches_read_bytes(config, mode, tokens, patches),
            "latent": patches * latent,
            "decoder": tokens * decoder,
            "decoder_cross_attention": self._bytes_read_patches(config, tokens, patches),
            "logits": tokens * self._head(config.decoder.dim),
        }

    def _patches_read_bytes(self, config: BLTConfig, mode: ActivationCheckpointing, tokens: int, patches: int) -> int:
        """Bytes of pooling, projection and the encoder's cross-attentions; no mode recomputes them."""
        cross, width, compute = config.cross_attention, config.encoder.dim, self.compute_bytes
        layers = config.encoder.num_layers if cross.encoder_placement == Placement.ALL else 1
        stream = self._byte_stream
        # The largest of each patch is found anew in the backward pass, among the bytes; where the stream is float32 the
        # norm keeps those too, and elsewhere the next block may, where it recomputes.
        is_last = config.encoder.num_layers == 1 or cross.encoder_placement == Placement.LAST
        is_kept = stream == _FLOAT32 or (mode is not ActivationCheckpointing.NONE and not is_last)
        pooled_from = compute * width if cross.pooling == Pooling.MAX and not is_kept else 0
        is_max = cross.pooling == Pooling.MAX
        pooled = stream * width if is_max or stream == compute else 0
        pooling = pooled + (compute * width if stream != compute else 0)
        # Torch's operations keep the lengths that means are divided by.
        pooling += _FLOAT32 if self.is_cpu and not is_max else 0
        segments = tokens * (_INT64 + pooled_from)
        # The norm reads float32, the query map its result, and the map to the output what attention gives.
        of_patch = cross.k * (_FLOAT32 * width + _FLOAT32 + 3 * compute * width)
        of_token = _FLOAT32 + compute * width + compute * 2 * width
        # The weights, or in a kernel what they sum to.
        sums = _FLOAT32 * cross.k * cross.num_heads
        of_token, of_patch = (of_token + sums, of_patch) if self.is_cpu else (of_token, of_patch + sums)
        # Of a stream in half precision the norm keeps a copy; the decoder keeps a float32 one itself.
        of_token += _FLOAT32 * width if stream < _FLOAT32 else 0
        return segments + patches * (pooling + layers * of_patch) + tokens * layers * of_token

    def _bytes_read_patches(self, config: BLTConfig, tokens: int, patches: int) -> int:
        """Bytes of the projection and the decoder's cross-attentions; no mode recomputes them."""
        cross, width, compute = config.cross_attention, config.decoder.dim, self.compute_bytes
        layers = config.decoder.num_layers if cross.decoder_placement == Placement.ALL else 1
        is_half = compute < _FLOAT32
        # Every layer's norm reads the same patches; in half precision each makes a float32 copy of its own.
        normed = cross.k * _FLOAT32 * width * (layers if is_half else 1)
        of_patch = cross.k * (_FLOAT32 + compute * width + compute * 2 * width)
        of_token = _FLOAT32 * width + _FLOAT32 + 3 * compute * width
        # A kernel makes the weights anew.
        of_token += _FLOAT32 * cross.k * cross.num_heads if self.is_cpu else 0
        latents = compute * config.latent.dim
        return patches * (latents + normed + layers * of_patch) + tokens * layers * of_token
