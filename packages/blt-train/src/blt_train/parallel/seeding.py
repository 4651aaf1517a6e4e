"""Initial weights that follow from the architecture and the seed alone, made where they are needed.

Every parameter is cut into blocks of rows by its shape, and every block has a generator of its own, seeded by (seed,
parameter's name, block). So a rank that holds some rows of a parameter makes just those, the weights are equal whatever
the number of ranks, the mesh and the device, and no rank ever holds a whole model that does not fit it.

The bits come from numpy's PCG64, which numpy promises to keep, and the normal distribution from its inverse in float64:
torch's own filling gives other numbers from release to release.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from blt_model import BLT, ByteLM
from blt_model import ModelConfig as ArchitectureConfig
from blt_model.initialization import CUT, standard_deviations
from blt_model.weights.streaming import build_model
from blt_train.parallel.rows import local_rows, rows_of

BLOCK_NUMBERS = 1 << 20
"""Weights of a block, about: what is made at once."""


def meta_model(architecture: ArchitectureConfig) -> tuple[BLT | ByteLM, dict[str, float | None]]:
    """Return a model without memory, and how its weights begin.

    Args:
        architecture: of either model.

    Returns:
        The model on the meta device, and by parameter name the standard deviation; None for ones.
    """
    with torch.device("meta"):
        model = build_model(architecture)
    return model, standard_deviations(model)


def fresh_model(architecture: ArchitectureConfig, seed: int) -> BLT | ByteLM:
    """Return a whole model with fresh weights on the CPU; equal seeds give equal weights on every machine.

    Args:
        architecture: of either model.
        seed: of the weights.
    """
    model, deviations = meta_model(architecture)
    model.to_empty(device="cpu")
    fill_weights(model, deviations, seed)
    return model


@torch.no_grad()
def fill_weights(model: nn.Module, deviations: Mapping[str, float | None], seed: int) -> None:
    """Fill the rows of a model's parameters that lie on this rank.

    Args:
        model: with memory; its parameters plain or sharded along dimension 0.
        deviations: from `meta_model`, for every parameter.
        seed: of the weights.
    """
    for name, parameter in model.named_parameters():
        deviation = deviations[name]
        rows = local_rows(parameter.detach())
        if deviation is None:
            rows.fill_(1.0)
        else:
            _fill_rows(rows, rows_of(parameter).first, name, seed, deviation)


def _fill_rows(rows: Tensor, first: int, name: str, seed: int, deviation: float) -> None:
    """Fill the rows [first, first + len(rows)) of a parameter, block by block."""
    width = math.prod(rows.shape[1:])
    block_rows = max(1, BLOCK_NUMBERS // max(1, width))
    end = first + len(rows)
    for block in range(first // block_rows, -(-end // block_rows)):
        start = block * block_rows
        upto = min(end, start + block_rows)
        numbers = _numbers(name, seed, block, (upto - start) * width, deviation).view(upto - start, *rows.shape[1:])
        begin = max(first, start)
        rows[begin - first : upto - first].copy_(numbers[begin - start :])


def _numbers(name: str, seed: int, block: int, count: int, deviation: float) -> Tensor:
    """Return the first `count` weights of a block: float32, normal, cut at CUT standard deviations."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, block, *words.tolist()])))
    # Uniform over the open interval in which the inverse error function stays within the cut: all bits are centred.
    uniform = torch.from_numpy(generator.random(count, dtype=np.float32)).double().add_(2.0**-25)
    inside = math.erf(CUT / math.sqrt(2.0))
    return uniform.mul_(2 * inside).sub_(inside).erfinv_().mul_(deviation * math.sqrt(2.0)).float()
