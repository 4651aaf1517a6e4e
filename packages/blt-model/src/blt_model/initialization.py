"""Initial weights: truncated normal, scaled by fan-in, residual outputs also by depth.

Linear maps and embeddings have standard deviation fan_in ** -0.5 (embeddings: dim ** -0.5), cut at three of them, as
the released models were trained from; the two maps of a block that write to the residual stream are further divided
by sqrt(2 * layers of their stack) (GPT-2's rule), so that the stream's variance does not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import nn

from blt_model.layers import Block

CUT = 3.0
"""Standard deviations at which the normal distribution is cut."""

_NOTES: ContextVar[dict[int, float] | None] = ContextVar("_NOTES", default=None)


class Resettable(Protocol):
    """A model that fills its own weights."""

    def reset_parameters(self) -> None:
        """Fill all weights afresh."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with their names."""


def standard_deviations(model: Resettable) -> dict[str, float | None]:
    """How the weights of a model begin, for those who fill them by other means than its `reset_parameters`.

    Args:
        model: on any device, such as meta; nothing in it changes but weights that begin as ones.

    Returns:
        By parameter name the standard deviation, before it is cut; None for a weight that begins as ones.
    """
    notes: dict[int, float] = {}
    token = _NOTES.set(notes)
    try:
        model.reset_parameters()
    finally:
        _NOTES.reset(token)
    return {name: notes.get(id(parameter)) for name, parameter in model.named_parameters()}


def truncated_normal(module: nn.Module, std: float) -> None:
    """Fill a module's weight from a normal distribution cut at three standard deviations; a meta tensor stays as is."""
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor")
    notes = _NOTES.get()
    if notes is not None:
        notes[id(weight)] = std
        return
    if weight.is_meta:
        # There is nothing to fill, and drawing "numbers" there makes torch load its compiler: seconds per command.
        return
    nn.init.trunc_normal_(weight, std=std, a=-CUT * std, b=CUT * std)


def initialize_linear(linear: nn.Linear, gain: float = 1.0) -> None:
    """Fill a linear map with standard deviation gain / sqrt(fan-in)."""
    truncated_normal(linear, gain * linear.in_features**-0.5)


def initialize_blocks(blocks: Iterable[Block]) -> None:
    """Fill a stack of blocks.

    Args:
        blocks: the whole stack, since the scale of the residual outputs depends on its depth.
    """
    stack = list(blocks)
    residual_gain = 1 / math.sqrt(2 * len(stack))
    for block in stack:
        initialize_linear(block.attention.query_key_value)
        initialize_linear(block.attention.output, residual_gain)
        initialize_linear(block.feed_forward.gate_value)
        initialize_linear(block.feed_forward.output, residual_gain)
        nn.init.ones_(block.attention_norm.weight)
        nn.init.ones_(block.feed_forward_norm.weight)
