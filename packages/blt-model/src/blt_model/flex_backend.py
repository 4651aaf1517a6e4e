"""Causal self-attention by torch's FlexAttention: one compiled CUDA kernel that skips blocks of the mask.

A block mask says, for blocks of 128 queries and 128 keys, which need not be looked at and which need no mask within. It
is worked out from the documents' offsets and the window without the [T, T] mask and without waiting for the GPU, once
for a batch, and all layers share it. Its index has (T / 128) ** 2 entries, 4 MB at 131,072 tokens.

Uncompiled, FlexAttention computes and keeps all T * T scores. So the function that is compiled here refuses to run in
any other way, whatever was the reason that torch did not compile it.

Torch's FlexAttention is imported where it is used: it loads the compiler, which takes seconds.

Legend: T tokens, C carried tokens, H query heads, G key and value heads, E head width, W window.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from blt_model.errors import ModelError
from blt_model.packed import segment_of
from blt_model.triton_support import HAS_TRITON

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries, and keys, of a block: torch's default, which every kernel of it supports."""
SHAPES = 64
"""Shapes of a process for which the kernel may be compiled, where torch lets a caller say so (8 where it does not)."""


def check_flex(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what FlexAttention cannot do compiled.

    Args:
        device: of the queries.
        dtype: of the queries.

    Raises:
        ModelError: no CUDA, float64, or no compiler.
    """
    if device.type != "cuda":
        raise ModelError(f"attention backend flex compiles a CUDA kernel, and got {device.type}; use backend sdpa.")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ModelError(f"attention backend flex computes in float16, bfloat16 or float32, and got {dtype}.")
    if not HAS_TRITON:
        raise ModelError("attention backend flex needs the compiler triton; install it, or use backend sdpa.")


def first_keys(query_offsets: Tensor, key_offsets: Tensor, num_tokens: int, carried: int, window: int | None) -> Tensor:
    """The first key that every query reads; it reads all from there to its own.

    Args:
        query_offsets: int32 [D + 1].
        key_offsets: int32 [D + 1], counted from the first carried key.
        num_tokens: T.
        carried: C.
        window: W, or None.

    Returns:
        int32 [T], never decreasing.
    """
    first = key_offsets[segment_of(query_offsets, num_tokens)]
    if window is None:
        return first
    return torch.maximum(first, torch.arange(num_tokens, device=first.device, dtype=first.dtype) + carried - window + 1)


def block_mask(first: Tensor, carried: int) -> BlockMask:
    """The mask of a batch.

    Args:
        first: int32 [T], what `first_keys` gives.
        carried: C.

    Returns:
        A block mask for T queries and C + T keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens = len(first)
    starts = torch.arange(0, num_tokens, BLOCK, device=first.device)
    ends = (starts + BLOCK - 1).clamp(max=num_tokens - 1)
    keys = torch.arange(0, carried + num_tokens, BLOCK, device=first.device)
    # Reaches never shrink, so a block's first query says where its keys begin and its last one where they end.
    touched = (keys + BLOCK > first[starts][:, None]) & (keys <= (ends + carried)[:, None])
    full = (keys >= first[ends][:, None]) & (keys + BLOCK <= (starts + carried + 1)[:, None])
    # The last block, where it is cut short, takes the mask, as torch's own maker of such masks has it.
    full &= (starts + BLOCK <= num_tokens)[:, None]

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= query + carried)

    return BlockMask.from_kv_blocks(
        *_ordered(touched & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed,
        seq_lengths=(num_tokens, carried + num_tokens),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, int32 [1, 1, rows], and which, int32 [1, 1, rows, columns], those first."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    if not torch.compiler.is_dynamo_compiling():
        raise ModelError(
            "attention backend flex was not compiled, and would keep all scores of all tokens; let torch.compile work "
            "(nothing may disable it), or use another backend."
        )
    from torch.nn.attention.flex_attention import flex_attention

    # Left to itself torch takes its decoding kernel for fewer than 128 queries, which in release 2.11 does not compile
    # where heads share keys.
    return flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        enable_gqa=key.shape[1] != query.shape[1],
        kernel_options={"BACKEND": "TRITON"},
    )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    options: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = SHAPES
    # fullgraph: torch raises where it would otherwise give up compiling and run the function as it is.
    return cast("Callable[..., Tensor]", torch.compile(_attend, dynamic=False, fullgraph=True, **options))


def attend_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Attend. Compiles at the first call for a shape; batches of equal capacities have equal shapes.

    Args:
        query: [T, H, E] on CUDA.
        key: [C + T, G, E].
        value: [C + T, G, E].
        mask: of this batch.

    Returns:
        [T, H, E].

    Raises:
        ModelError: torch does not compile it, or has compiled it for too many shapes.
    """
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    if torch.compiler.is_dynamo_compiling():
        return _attend(query, key, value, mask).squeeze(0).transpose(0, 1)
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        return _compiled()(query, key, value, mask).squeeze(0).transpose(0, 1)
    except FailOnRecompileLimitHit as error:
        raise ModelError(
            "attention backend flex met more shapes than torch compiles one function for; give batches fixed "
            "capacities, or use another backend."
        ) from error
