"""Causal self-attention on the CPU, document by document, straight from the tokens' own places.

Nothing is gathered, padded or masked beyond need. Without a window a document is one causal call of torch's flash
kernel. With one, its queries are cut into blocks, and a block reads the keys that its window reaches back to: all
blocks of all documents share one small additive mask, and where a document has more than a few blocks, some eight of
them are one call over views that overlap. Between forward and backward are kept the rotated heads, the result and one
number for each token and head.

The kernel is called below `scaled_dot_product_attention`, because its backward takes a result and its log-sum-exp:
autograd over views that overlap would first write each block's gradient into a tensor of the whole document's size.

Legend: T tokens, H query heads, G key and value heads, E head width, W window, B queries in a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CALL_TOKENS = 1024
"""Queries of one call where blocks are taken together; the keys' gradients of a call are a few times as many."""


@dataclass(frozen=True, slots=True)
class Spans:
    """The documents of a batch, and how their queries are cut."""

    documents: tuple[tuple[int, int], ...]
    """First token and end of every document that has tokens."""
    block: int = 0
    """B; 0 where no document outgrows the window."""
    mask: Tensor | None = None
    """float32 [B, W + B]: 0 where a query may read a key, -inf elsewhere; the keys begin W before the queries."""


def plan_spans(offsets: list[int], window: int | None) -> Spans:
    """Cut a batch.

    Args:
        offsets: D + 1 document offsets.
        window: W, or None where no document outgrows it.

    Returns:
        The plan.
    """
    documents = tuple((start, end) for start, end in itertools.pairwise(offsets) if end > start)
    if window is None:
        return Spans(documents)
    # A quarter of the window: smaller blocks leave the kernel too little work, larger ones compute more in vain.
    block = max(32, min(128, window // 4))
    queries, keys = torch.arange(block)[:, None], torch.arange(-window, block)
    allowed = (keys <= queries) & (keys > queries - window)
    return Spans(documents, block, torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf))


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the kernel: `count` blocks of queries, each with the keys that end with it."""

    first: int
    """First query."""
    count: int
    block: int
    """Queries of a block."""
    before: int
    """Keys of a block that come before its first query."""
    mask: Tensor | None
    """None for plain causality."""

    def queries(self, tensor: Tensor) -> Tensor:
        """[T, H, E] to a view [count, H, block, E]."""
        part = tensor[self.first : self.first + self.count * self.block]
        return part.view(self.count, self.block, *part.shape[1:]).transpose(1, 2)

    def keys(self, tensor: Tensor, heads: int) -> Tensor:
        """[T, G, E] to [count, heads, before + block, E]: a view where G is heads, repeated heads elsewhere."""
        part = tensor[self.first - self.before : self.first + self.count * self.block]
        view = part.unfold(0, self.before + self.block, self.block).transpose(2, 3)
        repeats = heads // tensor.shape[1]
        return view if repeats == 1 else view.repeat_interleave(repeats, dim=1)

    def add_keys_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Add [count, H, before + block, E] to the places in [T, G, E] that `keys` read."""
        if gradient.shape[1] != total.shape[1]:
            gradient = gradient.reshape(len(gradient), total.shape[1], -1, *gradient.shape[2:]).sum(2)
        for index, part in enumerate(gradient.transpose(1, 2)):
            start = self.first + index * self.block
            total[start - self.before : start + self.block] += part


def _calls(spans: Spans, dtype: torch.dtype) -> Iterator[_Call]:
    """The calls that cover all queries, in order."""
    if spans.mask is None:
        for start, end in spans.documents:
            yield _Call(start, 1, end - start, 0, None)
        return
    block, mask = spans.block, spans.mask.to(dtype)
    window = mask.shape[1] - block
    for document, end in spans.documents:
        start = document
        while start < end:
            before, length, count = min(start - document, window), min(block, end - start), 1
            if before == window and length == block:
                count = min((end - start) // block, max(1, CALL_TOKENS // block))
            # The mask is cut at the beginning of a document, where the window is not full yet, and at its end.
            yield _Call(start, count, length, before, mask[:length, window - before : window + length])
            start += count * length


def _attend(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> tuple[Tensor, list[Tensor]]:
    """The result [T, H, E], and the log-sum-exps of every call."""
    result, sums = torch.empty(query.shape, dtype=query.dtype), []
    heads = query.shape[1]
    for call in _calls(spans, query.dtype):
        part, sum_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            call.queries(query),
            call.keys(key, heads),
            call.keys(value, heads),
            is_causal=call.mask is None,
            attn_mask=call.mask,
        )
        call.queries(result).copy_(part)
        sums.append(sum_)
    return result, sums


def _attend_backward(
    gradient: Tensor, tensors: tuple[Tensor, ...], sums: tuple[Tensor, ...], spans: Spans, totals: tuple[Tensor, ...]
) -> None:
    """Write the gradients of query, key and value.

    Args:
        gradient: [T, H, E] of the result.
        tensors: query, key, value and result.
        sums: what `_attend` returned.
        spans: as in forward.
        totals: where to; those of key and value filled with what they begin with.
    """
    query, key, value, result = tensors
    heads = query.shape[1]
    for call, sum_ in zip(_calls(spans, query.dtype), sums, strict=True):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            call.queries(gradient),
            call.queries(query),
            call.keys(key, heads),
            call.keys(value, heads),
            call.queries(result),
            sum_,
            0.0,
            call.mask is None,
            attn_mask=call.mask,
        )
        call.queries(totals[0]).copy_(parts[0])
        call.add_keys_gradient(totals[1], parts[1])
        call.add_keys_gradient(totals[2], parts[2])


class Attend(torch.autograd.Function):
    """Attention of rotated heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """See `attend_spans`."""
        result, sums = _attend(query, key, value, spans)
        ctx.spans = spans
        ctx.save_for_backward(query, key, value, result, *sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of query, key and value."""
        query, key, value, result, *sums = ctx.saved_tensors
        totals = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        _attend_backward(gradients[0], (query, key, value, result), tuple(sums), ctx.spans, totals)
        return *totals, None


class TurnAndAttend(torch.autograd.Function):
    """Rotation in place, and attention. The map that made the heads does not need its own result again."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, phases: Tensor, kv_heads: int, spans: Spans) -> tuple[Tensor, Tensor]:
        """See `turn_and_attend`."""
        heads, sizes = _heads(flat, phases, kv_heads)
        _turn(heads[:, : sizes[0] + kv_heads], phases)
        query, key, value = torch.split(heads, sizes, dim=1)
        result, sums = _attend(query, key, value, spans)
        ctx.mark_dirty(flat)
        ctx.set_materialize_grads(False)
        ctx.kv_heads, ctx.spans = kv_heads, spans
        ctx.save_for_backward(flat, phases, result, *sums)
        return result, flat

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None]:
        """The gradient of the heads before rotation."""
        flat, phases, result, *sums = ctx.saved_tensors
        heads, sizes = _heads(flat, phases, ctx.kv_heads)
        total = torch.zeros_like(heads)
        if gradients[0] is not None:
            tensors = *torch.split(heads, sizes, dim=1), result
            _attend_backward(gradients[0], tensors, tuple(sums), ctx.spans, torch.split(total, sizes, dim=1))
        if gradients[1] is not None:
            total += gradients[1].view_as(total)
        _turn(total[:, : sizes[0] + ctx.kv_heads], phases.conj())
        return total.view_as(flat), None, None, None


def _heads(flat: Tensor, phases: Tensor, kv_heads: int) -> tuple[Tensor, list[int]]:
    """The view [T, H + 2 G, E], and how many heads are queries, keys and values."""
    heads = flat.view(len(flat), -1, 2 * phases.shape[-1])
    return heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads]


def _turn(heads: Tensor, phases: Tensor) -> None:
    """Rotate neighbouring pairs of [T, heads, E] in place by complex [T, 1, E / 2]."""
    torch.view_as_complex(heads.view(*heads.shape[:-1], -1, 2)).mul_(phases)


def attend_spans(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """Attend, with rotated queries and keys.

    Args:
        query: float32 or float64 [T, H, E].
        key: [T, G, E].
        value: [T, G, E].
        spans: of this batch.

    Returns:
        [T, H, E].
    """
    if torch.compiler.is_compiling():
        from blt_model.untraced import attend_untraced

        untraced: Tensor = attend_untraced(query, key, value, spans)
        return untraced
    result: Tensor = Attend.apply(query, key, value, spans)
    return result


def turn_and_attend(flat: Tensor, phases: Tensor, kv_heads: int, spans: Spans) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys in place, and attend.

    Args:
        flat: float32 or float64 [T, (H + 2 G) E]: queries, keys, values; no leaf. It is rotated in place.
        phases: complex [T, 1, E / 2], the rotary angles as unit numbers.
        kv_heads: G.
        spans: of this batch.

    Returns:
        The result [T, H, E], and the rotated [T, (H + 2 G) E].
    """
    if torch.compiler.is_compiling():
        from blt_model.untraced import turn_and_attend_untraced

        untraced: tuple[Tensor, Tensor] = turn_and_attend_untraced(flat, phases, kv_heads, spans)
        return untraced
    # Autograd lets no function of two results write into a view.
    flat = flat.clone() if flat._is_view() else flat.contiguous()
    result: tuple[Tensor, Tensor] = TurnAndAttend.apply(flat, phases, kv_heads, spans)
    return result
