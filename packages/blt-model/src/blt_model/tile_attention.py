"""Causal self-attention by Triton kernels of our own: documents, window and carried keys are two vectors of bounds.

The kernels are in `tile_kernels`, which loads triton; that happens at the first call. To torch they are two operations,
forward and backward, so that compiled code calls them as they are and checkpointing can keep the forward's results.
Shapes depend on T and C alone: nothing waits for the GPU, and a CUDA graph can hold a call.

Legend: T tokens, C carried tokens, H query heads, G key and value heads, E head width.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from blt_model.errors import ModelError
from blt_model.triton_support import HAS_TRITON

WIDTHS = (16, 32, 64, 128, 256)
"""Head widths that the kernels take."""

TILE = 64
"""Queries of a tile where documents are cut each by itself."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which keys every query reads, from both sides."""

    first: Tensor
    """int32 [T]: a query reads the keys from here to its own; never decreasing."""
    ends: Tensor
    """int32 [C + T]: of each key, how many queries have a first key that is not after it."""
    documents: Tensor | None = None
    """int32 [2, N] begins and ends of the forward's tiles, none of two documents; None where they need not be."""

    @classmethod
    def of(cls, first: Tensor, carried: int) -> Bounds:
        """The bounds that `first`, int32 [T], and C say."""
        keys = torch.arange(carried + len(first), device=first.device, dtype=first.dtype)
        return cls(first, torch.searchsorted(first, keys, right=True, out_int32=True))

    def by_document(self, offsets: Tensor) -> Bounds:
        """The same with tiles counted from each document's first query.

        Then a document's sums are taken in the same order, to the bit, whatever stands around it.

        Args:
            offsets: int32 [D + 1] of the documents among the queries.
        """
        counts = (offsets.diff() + TILE - 1) // TILE
        ends = counts.cumsum(0)
        tile = torch.arange(-(-len(self.first) // TILE) + len(counts), device=offsets.device)
        document = torch.searchsorted(ends, tile, right=True).clamp_(max=len(counts) - 1)
        starts = offsets[document] + (tile - ends[document] + counts[document]) * TILE
        return dataclasses.replace(self, documents=torch.stack([starts.int(), offsets[document + 1].int()]))


def is_tuned_for(device: torch.device) -> bool:
    """Whether the kernels were tuned for such a CUDA device: a Hopper or later, with Triton there."""
    return HAS_TRITON and torch.cuda.get_device_capability(device) >= (9, 0)


def check_triton(device: torch.device, dtype: torch.dtype, width: int | None = None) -> None:
    """Refuse where the kernels cannot run.

    Args:
        device: of the queries.
        dtype: of the queries.
        width: E; None where it is not known yet.

    Raises:
        ModelError: no CUDA, float64, no Triton, or a head width that is no power of two from 16 to 256.
    """
    if device.type != "cuda":
        raise ModelError(f"attention backend triton runs CUDA kernels, and got {device.type}; use backend sdpa.")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ModelError(f"attention backend triton computes in float16, bfloat16 or float32, and got {dtype}.")
    if not HAS_TRITON:
        raise ModelError("attention backend triton needs the package triton; install it, or use backend sdpa.")
    if width is not None:
        _check_width(width)


def _check_width(width: int) -> None:
    if width not in WIDTHS:
        raise ModelError(
            f"attention backend triton takes heads of {', '.join(map(str, WIDTHS))} numbers, and got {width}; use "
            "another backend."
        )


@functools.cache
def _kernels() -> ModuleType:
    """The kernels; loading them loads triton."""
    from blt_model import tile_kernels

    return tile_kernels


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, with the numbers of a head side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op(
    "blt_model::attend_tiles",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor first, Tensor ends, Tensor? documents=None) -> "
    "(Tensor, Tensor)",
)
def _attend(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, ends: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    inputs = (_contiguous_rows(tensor) for tensor in (query, key, value))
    result: tuple[Tensor, Tensor] = _kernels().forward(*inputs, first, documents)
    return result


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, ends: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return query.new_empty(query.shape), sums


@torch.library.custom_op(
    "blt_model::attend_tiles_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor query, Tensor key, Tensor value, Tensor first, Tensor ends, Tensor output, "
    "Tensor sums) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(upstream: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, upstream = (_contiguous_rows(tensor) for tensor in (*saved[:3], upstream))
    first, ends, output, sums = saved[3:]
    result: tuple[Tensor, Tensor, Tensor] = _kernels().backward(
        (query, key, value), (first, ends), (output, sums), upstream
    )
    return result


@_attend_backward.register_fake
def _(upstream: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (tensor.new_empty(tensor.shape) for tensor in saved[:3])
    return query, key, value


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return None, None, None, None, None, None
    return *_attend_backward(upstream, *ctx.saved_tensors), None, None, None


_attend.register_autograd(_differentiate, setup_context=_save)


def attend_tiles(query: Tensor, key: Tensor, value: Tensor, bounds: Bounds) -> Tensor:
    """Attend.

    Args:
        query: [T, H, E] on CUDA, float16, bfloat16 or float32. Any strides, and no copy is made where the last
            dimension is contiguous.
        key: [C + T, G, E], likewise; G divides H.
        value: [C + T, G, E].
        bounds: of this batch.

    Returns:
        Contiguous [T, H, E].

    Raises:
        ModelError: a head width that is no power of two from 16 to 256.
    """
    _check_width(query.shape[-1])
    output: Tensor = _attend(query, key, value, bounds.first, bounds.ends, bounds.documents)[0]
    return output
