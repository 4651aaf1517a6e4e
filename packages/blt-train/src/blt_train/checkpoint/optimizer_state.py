"""The optimizer's state as a section: tensors named `<moment>.<parameter name>`.

Works for every optimizer whose state per parameter is tensors: of the parameter's shape, which then lie on the
processes as the parameter does, or of any other shape (a step count), which every process holds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from blt_train.checkpoint.directory import resume_another
from blt_train.checkpoint.sections import Section, fill_tensor, open_section
from blt_train.errors import CheckpointError


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by `<moment>.<parameter name>`, as it is, without a copy.

    Args:
        model: without wrappers.
        optimizer: of the model's parameters; it has no state before its first step.
    """
    return {
        f"{moment}.{name}": value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give a fresh optimizer a checkpoint's state, whatever number of processes wrote it.

    Args:
        checkpoint: the checkpoint's directory.
        model: without wrappers, on its device, sharded already where it is to be.
        optimizer: fresh, of the model's parameters.

    Raises:
        CheckpointError: a file is missing or damaged, or the state is of other parameters.
    """
    reader = open_section(checkpoint, Section.OPTIMIZER)
    moments: dict[str, list[str]] = {}
    for key in reader.tensors:
        moment, _, name = key.partition(".")
        moments.setdefault(name, []).append(moment)
    parameters = dict(model.named_parameters())
    # Before its first step an optimizer has no state at all.
    if moments and sorted(moments) != sorted(parameters):
        odd = sorted({*moments} ^ {*parameters})[0]
        raise CheckpointError(
            f"{checkpoint}: its section {Section.OPTIMIZER} is of other parameters than the model's ({odd} is in one "
            f"only); {resume_another(checkpoint)}"
        )
    for name, kinds in moments.items():
        parameter = parameters[name]
        for moment in kinds:
            stored = reader.tensors[f"{moment}.{name}"]
            is_alike = stored.shape == tuple(parameter.shape)
            value = (
                torch.empty_like(parameter, dtype=stored.dtype, requires_grad=False)
                if is_alike
                else torch.empty(stored.shape, dtype=stored.dtype, device=parameter.device)
            )
            fill_tensor(reader, f"{moment}.{name}", value)
            optimizer.state[parameter][moment] = value
