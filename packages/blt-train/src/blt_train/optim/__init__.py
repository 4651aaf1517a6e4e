"""What changes the weights: parameter groups, optimizers, the learning rate, and the average of the weights."""

from __future__ import annotations

import torch
from torch import nn

from blt_train.config import OptimizerConfig, OptimizerName
from blt_train.optim.average import WeightAverage
from blt_train.optim.groups import Role, parameter_groups
from blt_train.optim.schedule import decay_start, learning_rate

__all__ = ["Role", "WeightAverage", "decay_start", "learning_rate", "make_optimizer", "parameter_groups"]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a model's parameters; its state is tensors, plain or sharded as the parameters are.

    Args:
        model: on its device, sharded already where it is to be.
        config: which optimizer, rates and decays.
    """
    groups = parameter_groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.name is OptimizerName.MUON:
        from blt_train.optim.muon import Muon

        return Muon(
            groups,
            lr=config.learning_rate,
            momentum=config.muon_momentum,
            iterations=config.muon_iterations,
            betas=betas,
            eps=config.epsilon,
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)
