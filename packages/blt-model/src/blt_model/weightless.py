"""Linear maps and embeddings that leave their first values to the model that holds them.

torch's own fill their weights when they are made. The models here fill all weights themselves afterwards, so that would
be done twice; and on the meta device, where `load_model` builds, it makes torch load its compiler, seconds per command.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """A linear map without bias whose weight [outputs, inputs] the model fills."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight to the model's own `reset_parameters`."""


class Embedding(nn.Embedding):
    """An embedding table whose weight [rows, dim] the model fills."""

    def reset_parameters(self) -> None:
        """Leave the weight to the model's own `reset_parameters`."""
