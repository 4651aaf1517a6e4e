"""Linear weights in 8 bits for generation on a CPU, where a step's time is that of reading the weights.

Every row of a weight (one output) is stored as whole numbers from -127 to 127 and one float32 scale, the row's largest
magnitude / 127. Embeddings, norms and hash tables stay as they are.

Products take their inputs in bfloat16 and add up in float32. A few rows of input go through torch's own kernel, which
reads the 8-bit numbers; many rows, as those of a prompt, go through a bfloat16 product with the same whole numbers,
which bfloat16 holds exactly.

Legend: n rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from blt_model.blt import BLT
from blt_model.byte_lm import ByteLM
from blt_model.errors import ModelError

FEW_ROWS = 4
"""Rows of input up to which torch's kernel for 8-bit weights is the faster way."""


class Int8Weight(Tensor):
    """A weight [O, I] that linear maps take in place of a dense one; nothing else can be done with it."""

    integers: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scales: Tensor) -> Int8Weight:
        """Wrap int8 [O, I] and scales [O]; the dtype shown is that of the scales."""
        weight = torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scales.dtype, device=integers.device)
        weight.integers, weight.scales = integers, scales
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply where a linear map is asked for; pass questions for shape, dtype and device on."""
        if func is F.linear and isinstance(args[1], Int8Weight):
            return product(args[0], args[1].integers, args[1].scales)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        """Refuse all other work.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"a weight of 8 bits is for linear maps only, not for {func}; load the model unquantized.")


class Int8Linear(nn.Module):
    """A linear map without bias whose weight has 8 bits."""

    integers: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Quantize a weight [O, I]."""
        super().__init__()
        integers, scales = quantize_rows(weight)
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Int8Weight:
        """What `torch.nn.functional.linear` takes as a weight."""
        return Int8Weight(self.integers, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        return product(x, self.integers, self.scales)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row to multiples of its scale.

    Args:
        weight: [O, I].

    Returns:
        int8 [O, I] and float32 [O]; their product differs from the weight by at most half a scale. A row of zeros has
        scale 1.
    """
    wide = weight.detach().float()
    largest = wide.abs().amax(1)
    scales = torch.where(largest > 0, largest / 127, 1.0)
    return (wide / scales[:, None]).round_().to(torch.int8), scales


def product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Apply a quantized linear map.

    Args:
        x: [..., I].
        values: int8 [O, I].
        scales: [O].

    Returns:
        [..., O] of x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if len(rows) <= FEW_ROWS:
        # The kernel's own scales would be rounded to bfloat16.
        whole = torch.ops.aten._weight_int8pack_mm(rows, values, scales.new_ones(len(scales), dtype=torch.bfloat16))
    else:
        whole = F.linear(rows, values.to(torch.bfloat16))
    result: Tensor = (whole * scales).to(x.dtype)
    return result.view(*x.shape[:-1], len(values))


def quantize_int8(model: BLT | ByteLM) -> None:
    """Quantize all linear weights of a model in place; it can then predict, and be neither trained nor saved as before.

    Args:
        model: on the CPU.

    Raises:
        ModelError: the model is on another device.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ModelError(f"8-bit weights are for the CPU and the model is on {device}; use bfloat16 there.")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight))


def linear_bytes(model: nn.Module) -> int:
    """Bytes that the weights of all linear maps of a model take, scales included."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel() * module.weight.element_size()
        elif isinstance(module, Int8Linear):
            total += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return total
