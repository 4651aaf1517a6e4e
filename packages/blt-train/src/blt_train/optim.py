"""The optimizer's parameter groups and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from blt_model.hash_embedding import HashEmbedding
from blt_train.config import OptimizerConfig, ScheduleConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return AdamW's parameter groups: matrices of linear maps decay; norms, biases and embeddings do not.

    Args:
        model: the model, without wrappers.
        weight_decay: of the first group.

    Returns:
        The decayed group and the other, each with parameters in the model's order.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, HashEmbedding))}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        (others if parameter.ndim < 2 or id(parameter) in tables else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return a fused AdamW over a model's parameters.

    Args:
        model: the model on its device, without wrappers.
        config: rates and decay.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of a step.

    Args:
        step: optimizer step, counted from 1 to `schedule.total_steps`.
        peak: the rate after the warm-up.
        schedule: warm-up, length and final fraction.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    remaining = schedule.total_steps - schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / remaining
    floor = schedule.min_lr_fraction
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
