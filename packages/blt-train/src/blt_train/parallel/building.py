"""A model made ready to train: recomputation, compilation and sharding in the order in which they fit together.

float8 replaces linear maps, so it comes first; recomputation goes inside what is compiled, so that the compiler sees
it; and sharding goes outside, whose hooks run between compiled blocks.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from blt_model import BLT, ByteLM
from blt_model import ModelConfig as ArchitectureConfig
from blt_train.config import Precision, TrainConfig
from blt_train.parallel.accumulation import accumulate_in_place
from blt_train.parallel.compilation import check_cpp_compiler, compile_blocks
from blt_train.parallel.float8 import use_float8
from blt_train.parallel.recomputation import recompute_blocks
from blt_train.parallel.seeding import fill_weights, meta_model
from blt_train.parallel.sharding import shard_model


def empty_model(
    architecture: ArchitectureConfig, config: TrainConfig, device: torch.device, mesh: DeviceMesh | None
) -> tuple[BLT | ByteLM, dict[str, float | None]]:
    """Return a model ready to train, with memory for this rank's part of the weights but no values in it.

    Args:
        architecture: of either model.
        config: of the run.
        device: where this rank computes.
        mesh: of all ranks; None for one process, whose model is plain.

    Returns:
        The model, and how its weights begin, for `fill_weights`.

    Raises:
        ConfigError: float8 is asked for, and torchao is not installed; or compiling for a CPU without a compiler.
    """
    model, deviations = meta_model(architecture)
    if config.parallel.float8:
        use_float8(model)
    recompute_blocks(model, config.parallel.activation_checkpointing)
    if config.compile:
        if device.type == "cpu":
            check_cpp_compiler()
        compile_blocks(model)
    is_half = config.precision is Precision.BFLOAT16 and device.type == "cuda"
    if mesh is not None:
        shard_model(model, mesh, config.parallel, compute_dtype=torch.bfloat16 if is_half else None)
    model.to_empty(device=device)
    # FSDP makes and adds up the gradients of what it shards.
    accumulate_in_place(model, maps=is_half and mesh is None and config.batch.micro_batches(1) > 1)
    return model, deviations


def new_model(
    architecture: ArchitectureConfig, config: TrainConfig, device: torch.device, mesh: DeviceMesh | None
) -> BLT | ByteLM:
    """Return a model ready to train, with the fresh weights of the config's seed.

    Args:
        architecture: of either model.
        config: of the run.
        device: where this rank computes.
        mesh: of all ranks; None for one process.

    Raises:
        ConfigError: float8 is asked for, and torchao is not installed; or compiling for a CPU without a compiler.
    """
    model, deviations = empty_model(architecture, config, device, mesh)
    fill_weights(model, deviations, config.seed)
    return model
