"""Activation checkpointing: what of a block is kept for its backward pass, and what is computed again.

- ``none`` keeps what autograd asks for.
- ``selective`` keeps what is dear to compute, the results of matrix products and of attention, and recomputes norms,
  rotations and gates.
- ``full`` keeps a block's input alone.

The unit is a transformer block. Weights and gradients are the same in all three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective_contexts

from blt_model.layers import Block
from blt_train.config import ActivationCheckpointing

_MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm")
_ATTENTIONS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "blt_model::attend_tiles",
    "flex_attention",
)
#: Order of the matrix products in a block's forward pass.
_QUERY_KEY_VALUE, _ATTENTION_OUTPUT, _GATE_VALUE, _FEED_FORWARD_OUTPUT = range(4)


def recompute_blocks(model: nn.Module, mode: ActivationCheckpointing) -> None:
    """Let every transformer block recompute in its backward pass.

    Args:
        model: not compiled and not sharded yet.
        mode: how much.
    """
    if mode is ActivationCheckpointing.NONE:
        return
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = _recomputing(module.forward, mode)  # type: ignore[method-assign]


def _recomputing(forward: Callable[..., Any], mode: ActivationCheckpointing) -> Callable[..., Any]:
    """Return a block's forward that keeps less. Nothing random happens in a block, so no generator is kept."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode is ActivationCheckpointing.SELECTIVE:
        options["context_fn"] = _contexts

    def recomputing(*arguments: Any) -> Any:
        return checkpoint(forward, *arguments, **options)

    return recomputing


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of one forward pass and of its recomputation, each of which counts for itself."""
    counts = {False: 0, True: 0}
    contexts = selective_contexts(functools.partial(_policy, counts))  # type: ignore[no-untyped-call]
    forward, recompute = contexts
    return forward, recompute


def _policy(
    counts: dict[bool, int], context: SelectiveCheckpointContext, operation: Any, *arguments: Any, **_: Any
) -> CheckpointPolicy:
    """Say whether an operation's result is kept."""
    name = _name(operation)
    if name in _ATTENTIONS:
        return CheckpointPolicy.MUST_SAVE
    if name in _MATRIX_PRODUCTS:
        index = counts[context.is_recompute]
        counts[context.is_recompute] += 1
        # The backward pass needs no result of the last one. On the CPU the first one's is rotated where it lies.
        is_rotated = index == _QUERY_KEY_VALUE and arguments[0].device.type == "cpu"
        if index != _FEED_FORWARD_OUTPUT and not is_rotated:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _name(operation: Any) -> str:
    """Return an operation's name without its overload; those of higher order have one alone."""
    schema = getattr(operation, "_schema", None)
    return str(schema.name) if schema is not None else str(getattr(operation, "name", lambda: "")())
