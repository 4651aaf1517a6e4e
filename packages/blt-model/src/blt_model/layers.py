"""The transformer block that all parts share: RMSNorm, rotary causal self-attention, SwiGLU.

Legend: T tokens, H query heads, G key and value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blt_model.attention import AttentionBackend, AttentionPlan, attend, plan_attention, resolve_backend
from blt_model.config import TransformerConfig
from blt_model.fused import rms_norm, swiglu
from blt_model.packed import segment_of
from blt_model.pointwise import split_heads
from blt_model.span_attention import turn_and_attend
from blt_model.triton_support import takes_kernels
from blt_model.weightless import Linear


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """What all blocks of a stack share in one forward.

    The rotary tables travel in here, and not as arguments of their own, so that wrappers which cast a module's tensor
    arguments to half precision leave them in float32.
    """

    plan: AttentionPlan
    """Who attends to whom."""
    cosine: Tensor
    """float32 [T, 1, E / 2]."""
    sine: Tensor
    """float32 [T, 1, E / 2]."""
    phases: Tensor | None = None
    """complex64 [T, 1, E / 2], both in one; there where the plan has spans."""

    @classmethod
    def make(cls, plan: AttentionPlan, positions: Tensor, config: TransformerConfig) -> SequenceLayout:
        """The layout of a stack.

        Args:
            plan: of its attention.
            positions: int64 [T] in the document.
            config: of the stack.
        """
        cosine, sine = rotary_tables(positions, config.head_dim, config.rope_theta)
        return cls(plan, cosine, sine, None if plan.spans is None else torch.complex(cosine, sine))


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles.

    The angles are products in float64, so that a position of fifty million is as exact as position five.

    Args:
        positions: int64 [T] in the document.
        head_dim: E, even.
        theta: base of the frequencies.

    Returns:
        Two float32 [T, 1, E / 2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64)[:, None, None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate neighbouring pairs (0, 1), (2, 3), ... of every head by its position's angles.

    Args:
        heads: [T, heads, E].
        cosine: float32 [T, 1, E / 2].
        sine: float32 [T, 1, E / 2].

    Returns:
        [T, heads, E] of the heads' dtype.
    """
    even, odd = torch.unbind(heads.view(*heads.shape[:-1], -1, 2), dim=-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(heads.dtype)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a linear layer's output of this tensor comes, autocast considered."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def document_positions(offsets: Tensor, length: int) -> Tensor:
    """The place of each position in its segment.

    Args:
        offsets: int32 [S + 1].
        length: number of positions.

    Returns:
        int64 [length].
    """
    starts = offsets.long()[segment_of(offsets, length)]
    return torch.arange(length, device=offsets.device) - starts


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., dim] over its last dimension; the result has the dtype of x."""
        return rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Rotary causal self-attention; query, key and value come from one matrix."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.query_key_value = Linear(config.dim, (self.num_heads + 2 * self.kv_heads) * self.head_dim)
        self.output = Linear(self.num_heads * self.head_dim, config.dim)

    def forward(
        self, x: Tensor, layout: SequenceLayout, carry: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            x: [T, dim], normalised.
            layout: of this batch.
            carry: keys (rotated) and values [C, G, E] that come before, where the plan says so.

        Returns:
            The output [T, dim], and all keys and values [C + T, G, E], the carried ones first.
        """
        flat: Tensor = self.query_key_value(x)
        sizes = [self.num_heads, self.kv_heads, self.kv_heads]
        if layout.phases is not None and layout.plan.spans is not None:
            dtype = flat.dtype
            wide = flat.to(torch.promote_types(dtype, torch.float32))
            mixed, wide = turn_and_attend(wide, layout.phases, self.kv_heads, layout.plan.spans)
            _, key, value = torch.split(wide.to(dtype).view(len(x), -1, self.head_dim), sizes, dim=1)
            return self.output(mixed.to(dtype).flatten(1)), key, value
        if takes_kernels(flat) and self.head_dim & (self.head_dim - 1) == 0:
            counts = self.num_heads, self.kv_heads
            query, key, value = split_heads(flat, layout.cosine, layout.sine, counts, carry)
            return self.output(attend(query, key, value, layout.plan).flatten(1)), key, value
        heads = flat.view(len(x), -1, self.head_dim)
        turning, value = torch.split(heads, [self.num_heads + self.kv_heads, self.kv_heads], dim=1)
        turned = rotate(turning, layout.cosine, layout.sine)
        query, key = torch.split(turned, [self.num_heads, self.kv_heads], dim=1)
        if carry is not None:
            key, value = torch.cat([carry[0], key]), torch.cat([carry[1], value])
        mixed = attend(query, key, value, layout.plan)
        return self.output(mixed.flatten(1)), key, value


class SwiGLU(nn.Module):
    """Gated feed-forward layer; gate and value come from one matrix."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_value = Linear(dim, 2 * hidden)
        self.output = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [T, dim] to [T, dim]."""
        result: Tensor = self.output(swiglu(self.gate_value(x)))
        return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.feed_forward_dim)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """Map [T, dim] to [T, dim]."""
        return self.stream(x, layout, None)[0]

    def stream(
        self, x: Tensor, layout: SequenceLayout, carry: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like forward, with keys and values [C, G, E] carried in; returns all of them [C + T, G, E] too."""
        mixed, key, value = self.attention(self.attention_norm(x), layout, carry)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), key, value


def make_layout(
    config: TransformerConfig,
    offsets: Tensor,
    x: Tensor,
    *,
    backend: AttentionBackend | str,
    max_length: int | None = None,
) -> SequenceLayout:
    """The layout of a stack over whole documents.

    Args:
        config: of the stack.
        offsets: int32 [S + 1] offsets of the segments that attend within themselves, the last equal to T.
        x: [T, dim] the stack's input, read for device and dtype only.
        backend: the attention backend wished for.
        max_length: upper bound of a segment's positions; None means T.

    Returns:
        What every block of the stack takes.
    """
    length = x.shape[0]
    plan = plan_attention(
        offsets,
        length,
        window=config.window,
        backend=resolve_backend(backend, x.device, compute_dtype(x), width=config.head_dim),
        max_length=max_length,
    )
    return SequenceLayout.make(plan, document_positions(offsets, length), config)
