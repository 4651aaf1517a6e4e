"""Keys and values of a patch with the weights of those who read it multiplied in, once for all bytes that do.

A byte's score of a vector is its head's query times the vector's key: (W_q x) . k = x . (W_q^T k). And what the head
adds to the byte is W_o (sum of shares times v) = sum of shares times (W_o v). So with W_q^T k and W_o v, which are made
once a patch, a byte that reads it multiplies two matrices of H K rows and columns where it had two of all the model's
width. Multi-head latent attention decodes by the same identity (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

Legend: L decoder layers with cross-attention, H heads, E head width, K vectors of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blt_model.generation.steps import CrossStep

_MULTIPLE = 32
"""Of which there are always as many scores, the last of which may stand for nothing."""


def padded(scores: int) -> int:
    """Scores of a byte, and those that stand for nothing."""
    return -(-scores // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True, slots=True)
class AbsorbedPatch:
    """A patch as bytes read it; P is `padded(H * K)`. Score h * K + j is that of head h and vector j."""

    keys: Tensor
    """[L, P, dim]: the scores that a normalised byte gives, scaled as attention scales them."""
    values: Tensor
    """[L, dim, P]: what an output takes from shares."""
    scores: int
    """H * K."""
    vectors: int
    """K."""

    @classmethod
    def empty(cls, weights: Tensor, vectors: int) -> AbsorbedPatch:
        """Room for patches of so many vectors, with nought in it, for weights as of `absorbed_weights`."""
        _, layers, heads, _, dim = weights.shape
        places = padded(heads * vectors)
        shapes = (layers, places, dim), (layers, dim, places)
        return cls(weights.new_zeros(shapes[0]), weights.new_zeros(shapes[1]), heads * vectors, vectors)


def absorbed_weights(crosses: Sequence[CrossStep]) -> Tensor:
    """The weights [2, L, H, E, dim] of queries and, transposed, of outputs, side by side."""
    maps = [[cross.query.detach(), cross.output.detach().T] for cross in crosses]
    stacked = torch.stack([torch.stack(kind) for kind in zip(*maps, strict=True)])
    return stacked.view(2, len(crosses), -1, crosses[0].head_dim, stacked.shape[-1])
