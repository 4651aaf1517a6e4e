"""Adding gradients up over micro batches where they lie, instead of making each anew and adding it to the last.

For the hash n-gram tables alone: a gradient of their own size for every micro batch, nearly all of it zeros, would cost
more memory and time than all else that they do. Other weights' gradients are full, and autograd adds them.
"""

from __future__ import annotations

from torch import nn

from blt_model.hash_embedding import HashEmbedding


def accumulate_in_place(model: nn.Module) -> None:
    """Let backward passes add the tables' gradients straight into `.grad`, for a model that is trained by `backward()`.

    Args:
        model: spread over ranks already, where it is to be.
    """
    for module in model.modules():
        if isinstance(module, HashEmbedding):
            module.accumulates_in_place = True
