"""Compiling a model block by block.

Blocks of one stack are the same code with other weights, so each kind is compiled once: the local encoder's, the latent
transformer's, the local decoder's, and both cross-attentions. What is around them (embedding, layouts, loss) is little
work and stays as it is; so do hooks that gather and free weights, which a whole compiled model would have to break at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from blt_model.cross_attention import CrossAttention
from blt_model.layers import Block
from blt_train.errors import ConfigError


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Let every block and cross-attention compile itself at its first call.

    Args:
        model: its batches must all have the same shapes, see `static_shapes` of the loader.
        backend: of `torch.compile`.
    """
    for module in model.modules():
        if isinstance(module, (Block, CrossAttention)):
            module.compile(dynamic=False, backend=backend)


def check_cpp_compiler() -> None:
    """Find the compiler that torch needs for compiled code on a CPU, instead of failing inside the first step.

    Raises:
        ConfigError: there is none.
    """
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise ConfigError(
            "compile is true, which on a CPU needs a C++ compiler, and none was found: install g++, name one in CXX, "
            "or use compile=false"
        ) from None


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model as it is written, for batches of other shapes than training's.

    Args:
        model: where none of it is compiled nothing changes, and torch's compiler, which takes seconds to load, stays
            unloaded.
    """
    if all(module._compiled_call_impl is None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
