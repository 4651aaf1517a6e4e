"""Linear maps and embeddings that leave their first values to the model that holds them.

torch's own fill their weights when they are made. The models here fill all weights themselves afterwards, so that would
be done twice; and on the meta device, where `load_model` builds, it makes torch load its compiler, seconds per command.
"""

from __future__ import annotations

from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear map without bias whose weight [outputs, inputs] the model fills."""

    #: Where backward passes add the weight's gradient themselves, see `weight_gradients`: a sum of the weight's shape
    #: and device, which must be its `.grad` when a step is made. None leaves gradients to autograd.
    gradient_sum: Tensor | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        if self.gradient_sum is None or not x.requires_grad:
            return super().forward(x)
        from blt_model.weight_gradients import linear

        return linear(x, self.weight, self.gradient_sum)

    def reset_parameters(self) -> None:
        """Leave the weight to the model's own `reset_parameters`."""


class Embedding(nn.Embedding):
    """An embedding table whose weight [rows, dim] the model fills."""

    def reset_parameters(self) -> None:
        """Leave the weight to the model's own `reset_parameters`."""
