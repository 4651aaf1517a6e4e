"""An exponential moving average of the weights, which often evaluates better than the last weights.

Averages are float32 and lie on the ranks as the parameters do. Early on the average is short, so that it does not drag
the random weights of the beginning along: of the decay and (1 + steps) / (10 + steps) the smaller counts, a function of
the step alone, so that a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blt_train.parallel.rows import local_rows


class WeightAverage:
    """Averages of all parameters of a model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights as they are.

        Args:
            model: without wrappers, on its device.
            decay: share of the average that a step keeps, at least 0 and below 1.
        """
        self._parameters = dict(model.named_parameters())
        self._decay = decay
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, plain or sharded as the parameters are; to read, not to write."""
        return dict(self._averages)

    def update(self, step: int) -> None:
        """Take the weights of a step in.

        Args:
            step: number of the step that made them, from 1.
        """
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        averages = [local_rows(average) for average in self._averages.values()]
        weights = [local_rows(parameter.detach()) for parameter in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from earlier averages.

        Args:
            tensors: what `tensors` was: the same names and shapes, plain or sharded alike.

        Raises:
            ValueError: names or shapes are others.
        """
        shapes = {name: tuple(average.shape) for name, average in self._averages.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
            raise ValueError("the averages are of another model's parameters")
        for name, average in self._averages.items():
            local_rows(average).copy_(local_rows(tensors[name]))
