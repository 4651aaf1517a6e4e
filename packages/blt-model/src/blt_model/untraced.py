"""What compiled code leaves alone and calls as it is where torch.compile traces.

Attention document by document: its calls follow the documents of each batch, for which compiled code would be made
anew. Sums of rows whose backward pass writes to a parameter's `.grad`: no compiler may reorder or repeat that. This
module is imported by code that is being traced only: the decorator loads torch's compiler, which takes seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blt_model.attention import AttentionPlan, attend_rectangles
from blt_model.row_gradients import sum_rows
from blt_model.span_attention import Spans, attend_spans, turn_and_attend


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
def attend_untraced(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """As `attend_spans`."""
    return attend_spans(query, key, value, spans)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_rectangles_untraced(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """As `attend_rectangles`."""
    return attend_rectangles(query, key, value, plan)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def turn_and_attend_untraced(flat: Tensor, phases: Tensor, kv_heads: int, spans: Spans) -> tuple[Tensor, Tensor]:
    """As `turn_and_attend`."""
    return turn_and_attend(flat, phases, kv_heads, spans)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sum_rows_untraced(table: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """As `sum_rows`."""
    return sum_rows(table, rows, weights)
