"""From a config to a plan: parameters, arithmetic, memory, time; without data and without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from blt_model import BLTConfig, ByteLMConfig, ModelError, blt_flops, byte_lm_flops, parameter_counts, preset
from blt_model import ModelConfig as ArchitectureConfig
from blt_train.config import ActivationCheckpointing, GpuName, PlanConfig, TrainConfig
from blt_train.errors import ConfigError
from blt_train.hardware import peak_flops_per_second
from blt_train.inputs import architecture_of_config
from blt_train.model_flops import TRAINING_FACTOR
from blt_train.planning.memory import Batch, MemoryModel, total

#: Bytes that a run may use by this reckoning: the figure of the GPU's name. What the GPU has beyond it (5 GB of an
#: H100) is left to the CUDA context, NCCL and fragmentation.
GPU_MEMORY = {GpuName.A100: 80_000_000_000, GpuName.H100: 80_000_000_000, GpuName.H200: 141_000_000_000}
_SECONDS_PER_DAY = 86_400
_PATCH_MULTIPLE = 8
#: Patches beyond the mean for which a sequence has room, as the packing plan usually needs.
_PATCH_ROOM = 1.05
_SPARE_PATCHES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run will take. Bytes are raw bytes of text where nothing else is said."""

    gpu: str
    """Kind of GPU."""

    gpus: int
    """Number of GPUs, and of processes."""

    assumptions: PlanConfig
    """What was assumed."""

    parameters: dict[str, int]
    """By part, and their `total`."""

    forward_flops_per_byte: dict[str, float]
    """Operations of a forward pass by part, and their `total`; a multiplication and an addition are 2."""

    training_flops_per_byte: float
    """Forward and backward pass, nothing recomputed."""

    bytes_per_step: float
    """In the global batch."""

    steps: int
    """Optimizer steps."""

    bytes: float
    """In all steps."""

    flops: float
    """In all steps."""

    bytes_per_second: float
    """Of all GPUs together, at the assumed utilisation."""

    days: float
    """For all steps."""

    gpu_hours: float
    """For all steps, of all GPUs together."""

    scoring_flops: float | None
    """Of the entropy LM over all bytes, once; None for the byte LM."""

    scoring_gpu_hours: float | None
    """At the same utilisation."""

    tokens_per_micro_batch: int
    """Positions, padding included."""

    patches_per_micro_batch: int
    """Patches, empty ones included; 0 for the byte LM."""

    micro_batches: int
    """Per step and rank."""

    memory: dict[str, int]
    """Bytes on one GPU by part, at the moment that needs most."""

    memory_phase: str
    """That moment: the end of the `forward` or `backward` pass, or the `update`."""

    memory_bytes: int
    """Sum of `memory`."""

    memory_by_checkpointing: dict[str, int]
    """What `memory_bytes` would be with each mode of activation checkpointing."""

    memory_limit: int
    """Bytes that the GPU is taken to have."""

    @property
    def fits(self) -> bool:
        """Whether the run fits the GPU's memory."""
        return self.memory_bytes <= self.memory_limit


def make_plan(config: TrainConfig, *, total_bytes: float | None = None) -> RunPlan:
    """Work out what a run will take.

    Args:
        config: of the run; what there is no telling without data and GPU is in its section `plan`.
        total_bytes: train on so many bytes instead of `schedule.total_steps`.

    Raises:
        ConfigError: the config is at odds with itself or with the number of GPUs.
    """
    assumed, architecture = config.plan, architecture_of_config(config)
    peak = _peak(config)
    parts = _forward_flops(config, architecture)
    # A document's EOS is predicted too, so there are a few more positions than bytes.
    tokens_per_byte = (assumed.document_bytes + 1) / assumed.document_bytes
    parts = {part: count * tokens_per_byte for part, count in parts.items()}
    training = TRAINING_FACTOR * parts["total"]
    tokens_per_step = config.batch.sequences_per_step * config.data.sequence_tokens
    bytes_per_step = tokens_per_step * assumed.utilisation / tokens_per_byte
    steps = config.schedule.total_steps if total_bytes is None else max(1, math.ceil(total_bytes / bytes_per_step))
    seconds = steps * bytes_per_step * training / (peak * assumed.gpus * assumed.mfu)
    scoring = _scoring_flops(config, architecture)
    scoring_flops = None if scoring is None else scoring * tokens_per_byte * steps * bytes_per_step
    batch = micro_batch(config, architecture)
    memory = _memory(config, architecture, batch)
    phase = max(memory, key=lambda name: total(memory[name]))
    return RunPlan(
        gpu=str(assumed.gpu),
        gpus=assumed.gpus,
        assumptions=assumed,
        parameters=dict(_parameters(architecture)),
        forward_flops_per_byte=parts,
        training_flops_per_byte=training,
        bytes_per_step=bytes_per_step,
        steps=steps,
        bytes=steps * bytes_per_step,
        flops=steps * bytes_per_step * training,
        bytes_per_second=steps * bytes_per_step / seconds,
        days=seconds / _SECONDS_PER_DAY,
        gpu_hours=seconds * assumed.gpus / 3600,
        scoring_flops=scoring_flops,
        scoring_gpu_hours=None if scoring_flops is None else scoring_flops / (peak * assumed.mfu) / 3600,
        tokens_per_micro_batch=batch.tokens,
        patches_per_micro_batch=batch.patches,
        micro_batches=batch.micro_batches,
        memory={part: count for part, count in memory[phase].items() if count},
        memory_phase=phase,
        memory_bytes=total(memory[phase]),
        memory_by_checkpointing={
            str(mode): memory_bytes(_with_checkpointing(config, mode)) for mode in ActivationCheckpointing
        },
        memory_limit=GPU_MEMORY[assumed.gpu],
    )


def memory_bytes(config: TrainConfig) -> int:
    """Return the bytes that a run needs on one GPU at its highest.

    Args:
        config: of the run.

    Raises:
        ConfigError: the config is at odds with itself or with the number of GPUs.
    """
    architecture = architecture_of_config(config)
    phases = _memory(config, architecture, micro_batch(config, architecture))
    return max(total(parts) for parts in phases.values())


def micro_batch(config: TrainConfig, architecture: ArchitectureConfig) -> Batch:
    """Return the sizes of a micro batch of one rank.

    Args:
        config: of the run.
        architecture: of its model.

    Raises:
        ConfigError: the batch does not divide among the GPUs.
    """
    micro_batches = config.batch.micro_batches(config.plan.gpus)
    sequences, tokens = config.batch.sequences_per_micro_batch, config.data.sequence_tokens
    patches = 0
    if isinstance(architecture, BLTConfig):
        wanted = config.data.sequence_patches
        if wanted is None:
            wanted = math.ceil(tokens / config.plan.patch_length * _PATCH_ROOM) + _SPARE_PATCHES
            wanted = -(-wanted // _PATCH_MULTIPLE) * _PATCH_MULTIPLE
        patches = sequences * wanted
    return Batch(tokens=sequences * tokens, patches=patches, micro_batches=micro_batches)


_parameters = functools.lru_cache(maxsize=64)(parameter_counts)


def _memory(config: TrainConfig, architecture: ArchitectureConfig, batch: Batch) -> dict[str, dict[str, int]]:
    return MemoryModel(architecture, config, config.plan.gpus).phases(batch)


def _with_checkpointing(config: TrainConfig, mode: ActivationCheckpointing) -> TrainConfig:
    parallel = dataclasses.replace(config.parallel, activation_checkpointing=mode)
    return dataclasses.replace(config, parallel=parallel)


def _peak(config: TrainConfig) -> float:
    """Return the operations per second of one GPU in the run's arithmetic."""
    peak = peak_flops_per_second(config.plan.gpu.upper(), config.precision, float8=config.parallel.float8)
    if peak is None:
        raise ConfigError(
            f"parallel.float8 is set, but an {config.plan.gpu} has no float8 arithmetic: set parallel.float8=false or "
            "another plan.gpu"
        )
    return peak


def _forward_flops(config: TrainConfig, architecture: ArchitectureConfig) -> dict[str, float]:
    """Return the operations of a forward pass per token, by part."""
    assumed = config.plan
    # A document longer than a sequence is cut, and attention does not reach over a cut.
    document = float(min(assumed.document_bytes + 1, config.data.sequence_tokens))
    if isinstance(architecture, ByteLMConfig):
        return byte_lm_flops(architecture, document_bytes=document)
    return blt_flops(architecture, patch_length=min(assumed.patch_length, document), document_bytes=document)


def _scoring_flops(config: TrainConfig, architecture: ArchitectureConfig) -> float | None:
    """Return the operations per token of the entropy LM that finds a BLT's patches."""
    if isinstance(architecture, ByteLMConfig):
        return None
    try:
        scorer = preset(config.plan.entropy_preset)
    except ModelError as error:
        raise ConfigError(f"plan.entropy_preset: {error}") from error
    if not isinstance(scorer, ByteLMConfig):
        raise ConfigError(f"plan.entropy_preset is {config.plan.entropy_preset}, a BLT: name a byte LM")
    # Documents are scored whole, however long.
    return byte_lm_flops(scorer, document_bytes=config.plan.document_bytes + 1.0)["total"]
