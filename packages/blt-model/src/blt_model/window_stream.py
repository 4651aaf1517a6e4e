"""What one window of documents hands to the next: the last keys and values of a stack with a sliding window.

Legend: T tokens, D documents, L layers, W window, C carried keys, G key and value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blt_model.attention import AttentionBackend, plan_attention, resolve_backend
from blt_model.config import TransformerConfig
from blt_model.errors import ModelError
from blt_model.layers import SequenceLayout, compute_dtype, document_positions
from blt_model.packed import segment_of


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a document that is not complete yet leaves for the next window. All shapes are fixed."""

    keys: Tensor
    """[L, C, G, E] rotated keys of the last C tokens; see `carried_keys`."""
    values: Tensor
    """[L, C, G, E]."""
    valid: Tensor
    """int64 scalar: how many of them, the last ones, belong to the document."""
    position: Tensor
    """int64 scalar: tokens of the document so far."""


def carried_keys(trunk: TransformerConfig) -> int:
    """C, the keys and values that a window hands to the next: W - 1, all that attention can reach.

    Where W is a multiple of 128 it is W: then keys carried over a cut at a multiple of 128 tokens fall into the same
    tiles of a GPU's kernel as they would without the cut, and its sums come out the same to the bit.

    Args:
        trunk: a stack with a window.

    Raises:
        ModelError: it has none.
    """
    if trunk.window is None:
        raise ModelError("a stack without window has no fixed number of keys to carry on; give it a window.")
    return trunk.window if trunk.window % 128 == 0 else trunk.window - 1


def first_state(trunk: TransformerConfig, *, dtype: torch.dtype, device: torch.device) -> StreamState:
    """The state before a document's first token.

    Args:
        trunk: the stack.
        dtype: of keys and values.
        device: where they lie.
    """
    shape = (trunk.num_layers, carried_keys(trunk), trunk.kv_heads, trunk.head_dim)
    # No tensor stands for two: compiled code would be made once more for the first window.
    keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    valid, position = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    return StreamState(keys, values, valid, position)


def stream_layout(
    trunk: TransformerConfig,
    offsets: Tensor,
    x: Tensor,
    state: StreamState,
    *,
    backend: AttentionBackend | str,
    max_length: int | None,
) -> SequenceLayout:
    """The layout of a stack over one window, the first document of which continues.

    Args:
        trunk: the stack.
        offsets: int32 [D + 1] of the documents in the window.
        x: [T, dim] the stack's input, T at least 1, read for length, device and dtype only.
        state: of the first document.
        backend: the attention backend wished for.
        max_length: upper bound of a document's tokens in the window; None means T.

    Raises:
        ModelError: the window holds no token.
    """
    length = x.shape[0]
    if length == 0:
        raise ModelError("the window holds no token; give at least one.")
    plan = plan_attention(
        offsets,
        length,
        window=trunk.window,
        backend=resolve_backend(backend, x.device, compute_dtype(x), width=trunk.head_dim),
        max_length=max_length,
        carried=carried_keys(trunk),
        carried_valid=state.valid,
    )
    continued = torch.where(segment_of(offsets, length) == 0, state.position, 0)
    positions = document_positions(offsets, length) + continued
    return SequenceLayout.make(plan, positions, trunk)


def next_state(offsets: Tensor, length: int, state: StreamState, keys: Tensor, values: Tensor) -> StreamState:
    """The state of the last document that has a token in a window.

    Args:
        offsets: int32 [D + 1] of the documents in the window.
        length: T.
        state: with which the window began.
        keys: [L, C, G, E], the last ones.
        values: [L, C, G, E].
    """
    # Kept one-dimensional: indexing by a scalar tensor would make the host wait for the GPU.
    last = segment_of(offsets, length)[-1:]
    continued = torch.where(last == 0, state.position, 0)
    position = (length - offsets.long().gather(0, last) + continued).squeeze(0)
    return StreamState(keys, values, position.clamp(max=keys.shape[1]), position)
