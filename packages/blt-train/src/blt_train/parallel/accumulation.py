"""Adding gradients up over micro batches where they lie, instead of making each anew and adding it to the last.

- Of the hash n-gram tables autograd would make a gradient of their own size for every micro batch, nearly all of it
  zeros: more memory and time than all else that they do.
- Of linear maps it would, in half precision, write a gradient, convert it and add it. The matrix product can add to
  the sum itself. For that the sums must be there before the first micro batch, so a step of one would gain nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from blt_model.hash_embedding import HashEmbedding
from blt_model.weightless import Linear


def accumulate_in_place(model: nn.Module, *, maps: bool = False) -> None:
    """Let backward passes add to `.grad` by themselves, for a model that is trained by `backward()`.

    Args:
        model: on its device; spread over ranks already, where it is to be.
        maps: whether linear maps do so as well as hash tables; for a plain model. Each step must then begin with
            `begin_accumulation`.
    """
    for module in model.modules():
        if isinstance(module, HashEmbedding):
            module.accumulates_in_place = True
        elif maps and isinstance(module, Linear):
            module.gradient_sum = torch.zeros_like(module.weight, requires_grad=False)


def begin_accumulation(model: nn.Module) -> None:
    """Make all gradients zero that linear maps add to by themselves, and the sums their `.grad`.

    Args:
        model: of any kind; nothing is done where there are none such.
    """
    sums = []
    for module in model.modules():
        if isinstance(module, Linear) and module.gradient_sum is not None:
            module.weight.grad = module.gradient_sum
            sums.append(module.gradient_sum)
    if sums:
        torch._foreach_zero_(sums)
