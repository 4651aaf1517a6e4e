"""Cross-attention between bytes and patches, in both directions.

Pre-normalised queries and keys, no positions, residual. In the released models the residual is added twice (see
`CrossAttentionConfig.double_residual`).

Legend: T tokens, P patches, K vectors of a patch, dim the local width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from blt_model.config import CrossAttentionConfig
from blt_model.initialization import initialize_linear
from blt_model.layers import RMSNorm
from blt_model.segments import Segments, bytes_read_patches, patches_read_bytes
from blt_model.weightless import Linear


class CrossAttention(nn.Module):
    """Weights of one cross-attention; the two subclasses say who reads whom."""

    def __init__(self, config: CrossAttentionConfig, dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = dim // config.num_heads
        self.residual = 2 if config.double_residual else 1
        self.query_norm = RMSNorm(dim, eps)
        self.key_norm = RMSNorm(dim, eps)
        self.query = Linear(dim, dim)
        self.key_value = Linear(dim, 2 * dim)
        self.output = Linear(dim, dim)

    def reset_parameters(self, num_layers: int) -> None:
        """Fill the weights afresh.

        Args:
            num_layers: depth of the local stack, which scales the residual output.
        """
        nn.init.ones_(self.query_norm.weight)
        nn.init.ones_(self.key_norm.weight)
        initialize_linear(self.query)
        initialize_linear(self.key_value)
        initialize_linear(self.output, 1 / math.sqrt(2 * num_layers))

    def _heads(self, reader: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of the reader, [..., H, E], and keys and values of what it reads, [..., 2, H, E]."""
        query: Tensor = self.query(self.query_norm(reader))
        key_value: Tensor = self.key_value(self.key_norm(read))
        width = self.head_dim
        return query.view(*query.shape[:-1], -1, width), key_value.view(*key_value.shape[:-1], 2, -1, width)

    def _add(self, reader: Tensor, mixed: Tensor) -> Tensor:
        out: Tensor = self.output(mixed.flatten(-2))
        return self.residual * reader + out


class PatchesReadBytes(CrossAttention):
    """The local encoder's: the K vectors of a patch read the bytes of that patch."""

    def forward(self, patches: Tensor, x: Tensor, segments: Segments) -> Tensor:
        """Update the patches.

        Args:
            patches: [P, K, dim].
            x: [T, dim] byte states.
            segments: the patch that holds each byte.

        Returns:
            [P, K, dim].
        """
        return self._add(patches, patches_read_bytes(*self._heads(patches, x), segments))


class BytesReadPatches(CrossAttention):
    """The local decoder's: every byte reads the K vectors of one patch."""

    def forward(self, x: Tensor, patches: Tensor, segments: Segments) -> Tensor:
        """Update the bytes.

        Args:
            x: [T, dim] byte states.
            patches: [P, K, dim].
            segments: the patch that each byte reads.

        Returns:
            [T, dim].
        """
        return self._add(x, bytes_read_patches(*self._heads(x, patches), segments))
