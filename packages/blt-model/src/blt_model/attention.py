"""Causal self-attention over packed documents: one function, four backends, memory linear in tokens.

- ``varlen``: torch's variable-length flash attention (CUDA, float16 or bfloat16). Offsets and window go to the kernel.
- ``triton``: our own Triton kernels (CUDA, not float64); see `tile_attention`.
- ``flex``: torch's FlexAttention (CUDA, not float64), compiled or not at all; see `flex_backend`.
- ``sdpa``: torch's scaled dot product (any device and dtype, with backward). On the CPU every document is attended
  where it lies, see `span_attention`. On CUDA, or with keys carried over, a window cuts the tokens into blocks, and
  every block of queries reads itself and the blocks that the window reaches back to: the mask has at most tokens x
  (window + 2 blocks) entries. Without a window, or where no document outgrows it, documents of similar length are
  attended together as small causal rectangles.

What depends on the batch alone is worked out once per forward (`plan_attention`) and shared by all layers.

Legend: T query tokens, C carried tokens, H query heads, G key and value heads, E head width, D documents, W window.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor

from blt_model.errors import ModelError
from blt_model.flex_backend import attend_flex, block_mask, check_flex, first_keys
from blt_model.packed import segment_of
from blt_model.span_attention import Spans, attend_spans, plan_spans
from blt_model.tile_attention import WIDTHS, Bounds, attend_tiles, check_triton, is_tuned_for

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

log = logging.getLogger(__name__)

TINY_DOCUMENT = 64
"""Mean tokens of a document below which documents are gathered into rectangles."""

_VARLEN_OPTIONS: frozenset[str] = frozenset()
# The import loads torch's compiler, which takes seconds, so it happens only where there is a device that can use it.
if torch.cuda.device_count() > 0:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        log.info("this build of torch has no varlen attention")
    else:
        _VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)


class AttentionBackend(StrEnum):
    """How self-attention is computed; the result is the same."""

    AUTO = "auto"
    VARLEN = "varlen"
    TRITON = "triton"
    FLEX = "flex"
    SDPA = "sdpa"


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Documents of similar length, attended as one [count, length] rectangle."""

    count: int
    length: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attention needs to know of a batch; made by plan_attention, used by attend."""

    backend: AttentionBackend
    """Any but AUTO."""
    window: int | None
    """Tokens that a token attends to, itself included; None for no limit."""
    query_offsets: Tensor
    """int32 [D + 1] offsets of the documents among the queries."""
    key_offsets: Tensor
    """int32 [D + 1] offsets of the documents among the keys; those of the first begin inside the carried ones."""
    max_queries: int
    """Upper bound of a document's queries."""
    carried: int = 0
    """C: keys and values that come before those of the queries."""
    block: int = 0
    """sdpa with a window: queries in a block."""
    mask: Tensor | None = None
    """sdpa with a window: bool [blocks, 1, block, before + block], before being W - 1 rounded up to whole blocks."""
    rectangles: tuple[Rectangle, ...] = ()
    """sdpa without window: the groups of documents."""
    gather: Tensor | None = None
    """sdpa without window: int64, the token at every place of the rectangles, end to end."""
    scatter: Tensor | None = None
    """sdpa without window: int64 [T], the place of every token."""
    spans: Spans | None = None
    """sdpa on the CPU with nothing carried: the documents, each attended where it lies."""
    block_mask: BlockMask | None = None
    """flex."""
    bounds: Bounds | None = None
    """triton."""


def resolve_backend(
    backend: AttentionBackend | str, device: torch.device, dtype: torch.dtype, *, width: int | None = None
) -> AttentionBackend:
    """Turn a wish into a backend.

    Args:
        backend: "auto" takes triton for half precision on Hopper and later, varlen on other CUDA devices, and sdpa
            elsewhere.
        device: of the queries.
        dtype: of the queries.
        width: E; None where it is not known yet.

    Returns:
        Any but AUTO.

    Raises:
        ModelError: unknown name, or varlen, triton or flex where it cannot run.
    """
    names = [str(member) for member in AttentionBackend]
    if backend not in names:
        raise ModelError(f"{backend!r} is no attention backend; choose one of {', '.join(names)}.")
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if backend == AttentionBackend.VARLEN:
        if not fits:
            raise ModelError(
                f"attention backend varlen needs float16 or bfloat16 on CUDA, and got {dtype} on {device.type}; use "
                "autocast, or backend sdpa."
            )
        if "window_size" not in _VARLEN_OPTIONS:
            raise ModelError("this torch has no varlen_attn with window_size; update torch, or use backend sdpa.")
        return AttentionBackend.VARLEN
    if backend == AttentionBackend.TRITON:
        check_triton(device, dtype, width)
        return AttentionBackend.TRITON
    if backend == AttentionBackend.FLEX:
        check_flex(device, dtype)
        return AttentionBackend.FLEX
    if backend == AttentionBackend.AUTO:
        return _automatic(device, width) if fits else AttentionBackend.SDPA
    return AttentionBackend.SDPA


def _automatic(device: torch.device, width: int | None) -> AttentionBackend:
    """What "auto" takes on CUDA in half precision: the fastest that runs."""
    if width in WIDTHS and is_tuned_for(device):
        return AttentionBackend.TRITON
    return AttentionBackend.VARLEN if "window_size" in _VARLEN_OPTIONS else AttentionBackend.SDPA


def plan_attention(
    offsets: Tensor,
    num_tokens: int,
    *,
    window: int | None,
    backend: AttentionBackend,
    max_length: int | None = None,
    carried: int = 0,
    carried_valid: Tensor | None = None,
) -> AttentionPlan:
    """Work out what attention needs to know of a batch.

    Args:
        offsets: int32 [D + 1] document offsets, the last equal to num_tokens.
        num_tokens: T.
        window: W, or None for no limit.
        backend: any but AUTO.
        max_length: upper bound of a document's tokens; None means T.
        carried: C, keys and values of the first document that come before the queries' own; needs a window.
        carried_valid: int64 scalar tensor, how many of the carried ones (the last of them) belong to the first
            document.

    Returns:
        The plan.
    """
    max_length = num_tokens if max_length is None else max_length
    key_offsets = offsets
    if carried:
        first = torch.zeros_like(offsets[:1]) if carried_valid is None else (-carried_valid).to(offsets.dtype).view(1)
        key_offsets = torch.cat([first, offsets[1:]]) + carried
    if window is not None and not carried and max_length <= window:
        window = None
    plan = AttentionPlan(backend, window, offsets, key_offsets, max_length, carried)
    if backend == AttentionBackend.VARLEN:
        return plan
    if backend in (AttentionBackend.TRITON, AttentionBackend.FLEX):
        first = first_keys(offsets, key_offsets, num_tokens, carried, window)
        if backend == AttentionBackend.TRITON:
            bounds = Bounds.of(first, carried)
            # Whoever carries keys cuts documents into windows, where they should give what they give whole.
            return dataclasses.replace(plan, bounds=bounds.by_document(offsets) if carried else bounds)
        return dataclasses.replace(plan, block_mask=block_mask(first, carried))
    if offsets.device.type == "cpu" and not carried:
        host = offsets.tolist()
        # A call for every document costs more than gathering where they are tiny.
        if window is not None or num_tokens >= TINY_DOCUMENT * len(set(host[1:])):
            return dataclasses.replace(plan, spans=plan_spans(host, window))
    if window is None:
        return _plan_rectangles(plan, num_tokens)
    return _plan_blocks(plan, num_tokens, window)


def _block_size(window: int) -> int:
    """Queries in a block: a half of the window wastes little work and leaves the kernels enough of it."""
    return max(16, min(256, window // 2))


def _plan_blocks(plan: AttentionPlan, num_tokens: int, window: int) -> AttentionPlan:
    block = _block_size(window)
    device = plan.query_offsets.device
    num_blocks = -(-num_tokens // block)
    queries = torch.arange(num_blocks * block, device=device)
    # Keys are numbered from the first query; those before a document's start or before the window are out of reach.
    starts = (plan.key_offsets.long() - plan.carried)[segment_of(plan.query_offsets, num_tokens)]
    starts = F.pad(starts, (0, num_blocks * block - num_tokens), value=num_tokens)
    first = torch.maximum(starts, queries - (window - 1)).minimum(queries).view(num_blocks, block, 1)
    before = -(-(window - 1) // block) * block
    keys = queries.view(num_blocks, block)[:, :1] + torch.arange(-before, block, device=device)
    keys = keys.unsqueeze(1)
    mask = (keys >= first) & (keys <= queries.view(num_blocks, block, 1))
    return dataclasses.replace(plan, block=block, mask=mask.unsqueeze(1))


def _plan_rectangles(plan: AttentionPlan, num_tokens: int) -> AttentionPlan:
    """Group documents by length. Reads the offsets on the host, which costs a wait where they are on a GPU."""
    host = plan.query_offsets.tolist()
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(host):
        if end > start:
            # Lengths of one group differ by at most a quarter, so little of a rectangle is filler.
            length = end - start
            step = max(8, 1 << max(length.bit_length() - 3, 0))
            groups.setdefault(-(-length // step) * step, []).append((start, length))
    rectangles, gathers = [], []
    scatter = torch.empty(num_tokens, dtype=torch.int64)
    place = 0
    for _, group in sorted(groups.items()):
        starts = torch.tensor([start for start, _ in group])
        lengths = torch.tensor([length for _, length in group])
        longest = int(lengths.max())
        columns = torch.arange(longest)
        tokens = starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)
        real = columns < lengths[:, None]
        scatter[tokens[real]] = place + torch.arange(tokens.numel()).view_as(tokens)[real]
        place += tokens.numel()
        rectangles.append(Rectangle(len(group), longest))
        gathers.append(tokens.flatten())
    device = plan.query_offsets.device
    return dataclasses.replace(
        plan, rectangles=tuple(rectangles), gather=torch.cat(gathers).to(device), scatter=scatter.to(device)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax attention of every token to itself and what precedes it in its document, within the window.

    Args:
        query: [T, H, E].
        key: [C + T, G, E], the carried ones first; G divides H.
        value: [C + T, G, E].
        plan: of this batch.

    Returns:
        [T, H, E] of the query's dtype.

    Raises:
        ModelError: a head width that the backend does not take, where none was known when it was chosen.
    """
    if plan.backend == AttentionBackend.VARLEN:
        return _attend_varlen(query, key, value, plan)
    if plan.bounds is not None:
        return attend_tiles(query, key, value, plan.bounds)
    if plan.block_mask is not None:
        return attend_flex(query, key, value, plan.block_mask)
    if plan.spans is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        return attend_spans(query.to(wide), key.to(wide), value.to(wide), plan.spans).to(query.dtype)
    if plan.mask is not None and query.device.type == "cpu" and query.dtype != torch.float32 and query.requires_grad:
        # Torch's CPU kernel takes twice the time of float32 for its masked backward in half precision.
        with torch.autocast("cpu", enabled=False):
            wide = torch.promote_types(query.dtype, torch.float32)
            return _attend_blocks(query.to(wide), key.to(wide), value.to(wide), plan, plan.mask).to(query.dtype)
    if plan.mask is not None:
        return _attend_blocks(query, key, value, plan, plan.mask)
    if torch.compiler.is_compiling():
        from blt_model.untraced import attend_rectangles_untraced

        untraced: Tensor = attend_rectangles_untraced(query, key, value, plan)
        return untraced
    return attend_rectangles(query, key, value, plan)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    options: dict[str, Any] = {}
    if grouped and "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = True
    elif grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    result = varlen_attn(
        query,
        key,
        value,
        plan.query_offsets,
        plan.key_offsets,
        plan.max_queries,
        plan.max_queries + plan.carried,
        window_size=(-1 if plan.window is None else plan.window - 1, 0),
        **options,
    )
    return cast(Tensor, result)


class _OverlappingBlocks(torch.autograd.Function):
    """Views of every block together with what comes before it; backward adds whole blocks, not single places."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, head: int, before: int, block: int, num_blocks: int) -> Tensor:
        """[C + T, G, E] to [blocks, G, before + block, E], after `head` rows of zeros."""
        ctx.sizes = len(tensor), head, before, block
        tail = before + num_blocks * block - head - len(tensor)
        padded = F.pad(tensor, (0, 0, 0, 0, head, tail))
        return padded.unfold(0, before + block, block).transpose(2, 3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        length, head, before, block = ctx.sizes
        num_blocks, heads, _, width = gradients[0].shape
        shifts = before // block
        total = gradients[0].new_zeros(num_blocks + shifts, block, heads, width)
        parts = gradients[0].transpose(1, 2).reshape(num_blocks, shifts + 1, block, heads, width)
        for shift in range(shifts + 1):
            total[shift : shift + num_blocks] += parts[:, shift]
        return total.flatten(0, 1)[head : head + length], None, None, None, None


def _attend_blocks(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, mask: Tensor) -> Tensor:
    num_tokens, num_heads, width = query.shape
    num_blocks, before = mask.shape[0], mask.shape[3] - plan.block
    sizes = before - plan.carried, before, plan.block, num_blocks
    keys, values = (_OverlappingBlocks.apply(tensor, *sizes) for tensor in (key, value))
    queries = F.pad(query, (0, 0, 0, 0, 0, num_blocks * plan.block - num_tokens))
    queries = queries.view(num_blocks, plan.block, num_heads, width).transpose(1, 2)
    result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=key.shape[1] != num_heads)
    return result.transpose(1, 2).reshape(num_blocks * plan.block, num_heads, width)[:num_tokens]


def attend_rectangles(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """As `attend`, by a plan that has rectangles."""
    if plan.gather is None or plan.scatter is None:
        raise ModelError("the attention plan has no rectangles; make it with plan_attention.")
    sizes = [rectangle.count * rectangle.length for rectangle in plan.rectangles]
    parts = [torch.split(tensor.index_select(0, plan.gather), sizes) for tensor in (query, key, value)]
    results = []
    for rectangle, *qkv in zip(plan.rectangles, *parts, strict=True):
        q, k, v = (t.view(rectangle.count, rectangle.length, *t.shape[1:]).transpose(1, 2) for t in qkv)
        # Filler comes last in every row, so that causality alone keeps it from all real tokens.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        results.append(out.transpose(1, 2).reshape(-1, *query.shape[1:]))
    return torch.cat(results).index_select(0, plan.scatter)
