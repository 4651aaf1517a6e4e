"""Triton kernels for the end of a step of one row: its head, and in the same launch what is made of the logits.

The program of the head that is the last to end does the rest, so that nothing waits for a further launch. As in
`kernels`, sums are taken in float32 and in a fixed order, and the module needs triton.

Legend: K inputs, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blt_model.generation.kernels import KINDS, dependence
from blt_model.generation.linear_kernels import linear_shape, outputs_of_one
from blt_model.generation.token_kernels import entropy_of, is_skipped, likeliest_of, put_step


@triton.jit
def _is_last(
    x, weight, norm, logits, arrived, outputs, eps, kind: tl.constexpr, WORDS: tl.constexpr, EACH: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, EXACT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Leave some logits; whether all others have been left."""
    result, row, kept = outputs_of_one(
        x, x, weight, norm, outputs, eps, kind, WORDS, True, False, 0, 1, 1, 1, EACH, GROUPS, CHUNK, AHEAD, EXACT,
        DEPENDENT,
    )  # fmt: skip
    tl.store(logits + row, result, mask=kept)
    # What a program has written is seen by whoever sees that it has arrived.
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def _entropy_after(
    x, weight, norm, logits, arrived, outputs, eps, skipped, out, kind: tl.constexpr, WORDS: tl.constexpr,
    EACH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, EXACT: tl.constexpr,
    BLOCK: tl.constexpr, SKIPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some logits, and of the last program the entropy."""
    if not is_skipped(skipped, SKIPS):  # noqa: SIM102  # triton runs both sides of an and
        if _is_last(
            x, weight, norm, logits, arrived, outputs, eps, kind, WORDS, EACH, GROUPS, CHUNK, AHEAD, EXACT, DEPENDENT
        ):
            v = tl.arange(0, BLOCK)
            inside = v < outputs
            value = entropy_of(tl.load(logits + v, mask=inside, other=-float("inf"), volatile=True), inside)
            tl.store(out, tl.where(value == value, value, float("inf")))


@triton.jit
def _likeliest_after(
    x, weight, norm, logits, arrived, outputs, eps, skipped, tokens, counters, cleared, place, result, first, end,
    kind: tl.constexpr, WORDS: tl.constexpr, EACH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    AHEAD: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, ROOM: tl.constexpr,
    BEFORE: tl.constexpr, CLEARS: tl.constexpr, SKIPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some logits, and of the last program the choice."""
    if not is_skipped(skipped, SKIPS):  # noqa: SIM102  # triton runs both sides of an and
        if _is_last(
            x, weight, norm, logits, arrived, outputs, eps, kind, WORDS, EACH, GROUPS, CHUNK, AHEAD, EXACT, DEPENDENT
        ):
            v = tl.arange(0, BLOCK)
            scores = tl.load(logits + v, mask=v < outputs, other=-float("inf"), volatile=True)
            chosen, log_probability = likeliest_of(scores, v, first, end)
            put_step(chosen, log_probability, tokens, counters, cleared, place, result, COUNT, ROOM, BEFORE, CLEARS)


class Head:
    """A model's last normalisation and linear map, for one row at a time."""

    def __init__(self, norm: Tensor, weight: Tensor, eps: float) -> None:
        """Make room for the logits.

        Args:
            norm: [K] scales.
            weight: [V, K] of the norm's dtype.
            eps: of the normalisation.
        """
        self._norm, self._weight, self._eps = norm, weight, eps
        self._logits = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=weight.device)

    def _launch(self, kernel: Any, x: Tensor, skipped: Tensor | None, *arguments: Any, **constants: int) -> None:
        outputs, words = len(self._weight), self._weight.shape[1] * self._weight.element_size() // 4
        shape = linear_shape(outputs, words, gated=False, joined=False)
        kernel[(triton.cdiv(outputs, shape.rows),)](
            x.view(torch.int32),
            self._weight.view(torch.int32),
            self._norm.view(torch.int32),
            self._logits,
            self._arrived,
            outputs,
            self._eps,
            self._arrived if skipped is None else skipped,
            *arguments,
            kind=KINDS[self._weight.dtype],
            WORDS=words,
            **shape.options(outputs, words),
            BLOCK=triton.next_power_of_2(outputs),
            SKIPS=skipped is not None,
            **constants,
            **dependence(),
        )

    def entropy(self, x: Tensor, out: Tensor, skipped: Tensor | None = None) -> None:
        """Entropy of the distribution that a row gives.

        Args:
            x: [1, K] contiguous, of the weight's dtype.
            out: float32, at least [1], to write to, nats; may be pinned memory of the host. Infinity stands for what is
                not a number, as that stands there before anything has come.
            skipped: see `token_kernels.hand_over`.
        """
        self._launch(_entropy_after, x, skipped, out)

    def likeliest(
        self, x: Tensor, tokens: Tensor, counters: Tensor, place: Tensor, result: Tensor, *, first: int, end: int,
        before: int, cleared: Tensor | None = None, skipped: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Choose the likeliest token after a row and hand it over.

        Args:
            x: [1, K] contiguous, of the weight's dtype.
            tokens: with counters, place, result and before as of `token_kernels.hand_over`.
            counters: see there.
            place: see there.
            result: see there.
            first: tokens from here on may be chosen,
            end: and this one.
            before: see there.
            cleared: see there.
            skipped: see there.
        """
        count = counters.numel()
        self._launch(
            _likeliest_after,
            x,
            skipped,
            tokens,
            counters,
            counters if cleared is None else cleared,
            place,
            result,
            first,
            end,
            COUNT=count,
            ROOM=triton.next_power_of_2(count),
            BEFORE=before,
            CLEARS=cleared is not None,
        )
