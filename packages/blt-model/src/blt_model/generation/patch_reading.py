"""What the decoder's cross-attention reads of every row's newest complete patch, in one of two forms.

`KeptPatches` keeps keys and values, and every byte goes through the layers' query and output maps, which all rows
share. `FoldedPatches` keeps those maps folded with keys and values, which is less to read while the rows are few: 128
KB a row and layer of `blt-1b`, against 4 MB for any number of rows.

Legend: B rows, n rows of a step, m rows that complete a patch, L layers, H heads, E head width, K vectors of a patch.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Protocol

from torch import Tensor

from blt_model.generation import fused
from blt_model.generation.steps import CrossStep

FOLDED_ROWS = 16
"""Up to so many rows the folded form is less to read and to write."""


@functools.cache
def _kernels() -> ModuleType:
    """The kernels of the folded form; loading them loads triton."""
    from blt_model.generation import folding_kernels

    return folding_kernels


class PatchReading(Protocol):
    """What the decoder reads of the newest complete patches."""

    def put(self, rows: Tensor, vectors: Tensor) -> None:
        """Make vectors [m, K, dim] those that rows, int64 [m], read from now on."""
        ...

    def read(self, index: int, x: Tensor) -> Tensor:
        """Let the bytes [n, dim] of the first n rows read, in the index-th layer; returns [n, dim]."""
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Copy what a row reads over what another reads."""
        ...


class KeptPatches:
    """Keys and values."""

    def __init__(self, layers: list[CrossStep], rows: int, vectors: int, *, is_fused: bool) -> None:
        """Make room.

        Args:
            layers: the decoder's cross-attentions.
            rows: B.
            vectors: K.
            is_fused: run the kernels of `fused`.
        """
        self._layers = layers
        self._patch_keys = fused.PatchKeys(layers) if is_fused else None
        weight, width = layers[0].query, layers[0].head_dim
        shape = (len(layers), rows, len(weight) // width, vectors, width)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        """[L, B, H, K, E]."""

    def put(self, rows: Tensor, vectors: Tensor) -> None:
        """See `PatchReading`."""
        if self._patch_keys is not None:
            keys, values = self._patch_keys(vectors)
            self.keys.index_copy_(1, rows, keys)
            self.values.index_copy_(1, rows, values)
            return
        for index, layer in enumerate(self._layers):
            keys, values = layer.keys_values(vectors)
            self.keys[index].index_copy_(0, rows, keys)
            self.values[index].index_copy_(0, rows, values)

    def read(self, index: int, x: Tensor) -> Tensor:
        """See `PatchReading`."""
        count, layer = len(x), self._layers[index]
        if self._patch_keys is not None:
            return fused.read_patches(layer, x, self.keys[index], self.values[index])
        return layer(x[:, None], self.keys[index, :count], self.values[index, :count]).squeeze(1)

    def copy_row(self, source: int, target: int) -> None:
        """See `PatchReading`."""
        for buffer in (self.keys, self.values):
            buffer[:, target] = buffer[:, source]


class FoldedPatches:
    """The layers' maps folded with keys and values; see `folding_kernels`."""

    def __init__(self, layers: list[CrossStep], rows: int, vectors: int) -> None:
        """Make room.

        Args:
            layers: the decoder's cross-attentions; their weights are used where they lie, and must stay there.
            rows: B.
            vectors: K.
        """
        scattered = _kernels().Scattered.of
        self._patch_keys = fused.PatchKeys(layers)
        self._norms = scattered([layer.query_norm.weight for layer in layers])
        self._queries = scattered([layer.query for layer in layers])
        self._outputs = scattered([layer.output for layer in layers])
        self._eps, self._residual = layers[0].query_norm.eps, float(layers[0].residual)
        weight = layers[0].query
        dim = len(weight)
        self._heads = dim // layers[0].head_dim
        pairs = self._heads * vectors
        self.score_map = weight.new_zeros((len(layers), rows, pairs, dim))
        """[L, B, H * K, dim]: times x and 1 / the root of its mean square, the score of head h and vector k."""
        self.output_map = weight.new_zeros((len(layers), rows, dim, pairs))
        """[L, B, dim, H * K]: times the softmax over k of the scores, what is added to the residual times x."""

    def put(self, rows: Tensor, vectors: Tensor) -> None:
        """See `PatchReading`."""
        key_value = self._patch_keys.product(vectors)
        maps = self._norms, self._queries, self._outputs, self.score_map, self.output_map
        _kernels().fold(key_value, rows, *maps, self._heads)

    def read(self, index: int, x: Tensor) -> Tensor:
        """See `PatchReading`."""
        maps = self.score_map[index], self.output_map[index]
        result: Tensor = _kernels().read_folded(x, *maps, self._heads, residual=self._residual, eps=self._eps)
        return result

    def copy_row(self, source: int, target: int) -> None:
        """See `PatchReading`."""
        for buffer in (self.score_map, self.output_map):
            buffer[:, target] = buffer[:, source]


def patch_reading(layers: list[CrossStep], rows: int, vectors: int, *, is_fused: bool) -> PatchReading:
    """The form for so many rows.

    Args:
        layers: the decoder's cross-attentions.
        rows: B.
        vectors: K.
        is_fused: whether the kernels of `fused` are available.
    """
    if is_fused and rows <= FOLDED_ROWS:
        return FoldedPatches(layers, rows, vectors)
    return KeptPatches(layers, rows, vectors, is_fused=is_fused)
