"""The config of a training run: frozen dataclasses whose checks run on every way of making one.

A YAML file has the same shape as `TrainConfig`: one key per field, one nested mapping per section. Reading files is in
`config_files`, `key=value` overrides and types in `config_parsing`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from blt_train.errors import ConfigError

#: Padding needs up to two patches of its own, and a document up to two: fewer patches cannot hold anything.
MIN_SEQUENCE_PATCHES = 4
#: One document and the padding's pseudo-document.
MIN_SEQUENCE_DOCUMENTS = 2
#: Length of sequences where nothing says otherwise.
DEFAULT_SEQUENCE_TOKENS = 2048
#: A patch split into its first token and the rest needs two tokens.
MIN_SEQUENCE_TOKENS = 2


#: Torch crashes where it cannot start as many threads as it is told to.
MAX_THREADS = 1024


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass; weights and optimizer state are always float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class ActivationCheckpointing(StrEnum):
    """What of a block's forward pass is computed again in its backward pass rather than kept."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise the error of a field whose value breaks its rule."""
    if not condition:
        raise ConfigError(f"{name} must be {rule}, not {value!r}")


#: What `_is_positive` asks, for errors.
_POSITIVE = "a finite number above 0"


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _is_fraction(value: float) -> bool:
    return 0 <= value <= 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained."""

    preset: str
    """Name of a preset of `blt_model` (`blt_model.PRESETS`); it decides between the byte LM and the BLT."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the preset's own config that replace the preset's values, nested as that config is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source of a mixture."""

    train: str
    """Shard directory to train on, as `data.train`."""

    holdout: str | None = None
    """Shard directory of held-out documents of this source; null for none."""

    weight: float = 1.0
    """Share of the training sequences, relative to the other sources' weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards are read and how documents are packed into sequences."""

    train: str | None = None
    """Shard directory to train on: byte shards for the byte LM, patched shards for the BLT."""

    holdout: str | None = None
    """Shard directory of held-out documents for evaluation, of the same kind; null for no evaluation."""

    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    """A mixture instead of `data.train`: by name, the `train`, `holdout` and `weight` of each source."""

    sequence_tokens: int = DEFAULT_SEQUENCE_TOKENS
    """Tokens per sequence; every sequence has exactly as many, the unused ones being padding."""

    sequence_patches: int | None = None
    """Patches per sequence (BLT only); null finds the smallest count that keeps utilisation above 0.97."""

    sequence_documents: int | None = None
    """Documents per sequence at most; null derives from a sample how many fill the sequences."""

    verify: bool = True
    """Recompute the shards' checksums (seconds per GB) before the first step, or for each group when it is read."""

    group_documents: int = 4_000_000
    """Documents shuffled and packed together; larger corpora go group by group, at about 100 bytes a document."""

    workers: int = 1
    """Threads of each process that build batches; 0 builds them in the training thread. Batches are the same."""

    prefetch: int = 4
    """Micro batches that the loader's threads keep ready ahead of the model; at least one per thread."""

    @property
    def training_sources(self) -> Mapping[str, SourceConfig]:
        """The sources by name, also where there is only one, which is then named `train`."""
        if self.train is not None:
            return {"train": SourceConfig(train=self.train, holdout=self.holdout)}
        return self.sources

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._check_sources()
        _require(self.group_documents >= 1, "data.group_documents", self.group_documents, "at least 1")
        _require(
            0 <= self.workers <= MAX_THREADS, "data.workers", self.workers, f"at least 0 and at most {MAX_THREADS}"
        )
        tokens, patches, documents = self.sequence_tokens, self.sequence_patches, self.sequence_documents
        _require(tokens >= MIN_SEQUENCE_TOKENS, "data.sequence_tokens", tokens, f"at least {MIN_SEQUENCE_TOKENS}")
        if patches is not None:
            _require(
                patches >= MIN_SEQUENCE_PATCHES, "data.sequence_patches", patches, f"at least {MIN_SEQUENCE_PATCHES}"
            )
        if documents is not None:
            rule = f"at least {MIN_SEQUENCE_DOCUMENTS}"
            _require(documents >= MIN_SEQUENCE_DOCUMENTS, "data.sequence_documents", documents, rule)
        _require(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1")

    def _check_sources(self) -> None:
        """Check that there is one directory, or a mixture, but not both."""
        if self.train is None and not self.sources:
            raise ConfigError("data.train is missing; give it in the file or as data.train=VALUE, or give data.sources")
        if self.sources and self.train is not None:
            raise ConfigError(f"data.train is {self.train!r}, but there are data.sources too: remove one of the two")
        if self.sources and self.holdout is not None:
            raise ConfigError(
                f"data.holdout is {self.holdout!r}, but there are data.sources: give it to one of them as its holdout"
            )
        for name, source in self.sources.items():
            rule = "a name of letters, digits, - and _"
            _require(re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None, "a key of data.sources", name, rule)
            _require(_is_positive(source.weight), f"data.sources.{name}.weight", source.weight, _POSITIVE)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How many sequences make a step, and how many fit a device at once."""

    sequences_per_step: int = 8
    """Sequences in the global batch of one optimizer step, over all ranks; independent of the number of ranks."""

    sequences_per_micro_batch: int = 8
    """Sequences in one forward and backward pass of one rank; smaller needs less memory, same result."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("sequences_per_step", "sequences_per_micro_batch"):
            _require(getattr(self, name) >= 1, f"batch.{name}", getattr(self, name), "at least 1")

    def micro_batches(self, world_size: int) -> int:
        """Return how many micro batches each rank runs per step.

        Args:
            world_size: number of ranks.

        Raises:
            ConfigError: the global batch does not divide evenly among ranks and micro batches.
        """
        together = world_size * self.sequences_per_micro_batch
        if self.sequences_per_step % together:
            raise ConfigError(
                f"batch.sequences_per_step is {self.sequences_per_step}, which is no multiple of {world_size} "
                f"process(es) x {self.sequences_per_micro_batch} sequences_per_micro_batch = {together}: change one "
                "of the three"
            )
        return self.sequences_per_step // together


class OptimizerName(StrEnum):
    """What moves the weights."""

    ADAMW = "adamw"
    MUON = "muon"


class ScheduleKind(StrEnum):
    """Course of the learning rate after the warm-up."""

    COSINE = "cosine"
    WSD = "wsd"
    CONSTANT = "constant"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer and what is added to its loss; norms and biases are never decayed."""

    name: OptimizerName = OptimizerName.ADAMW
    """`adamw`, or `muon`: Muon for the linear maps between hidden states, AdamW for embeddings, head and norms."""

    learning_rate: float = 4e-4
    """Peak learning rate, reached after the warm-up; Muon's updates are scaled so that AdamW's rates suit them."""

    beta1: float = 0.9
    """Decay of AdamW's first moment per step."""

    beta2: float = 0.95
    """Decay of AdamW's second moment per step."""

    epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""

    muon_momentum: float = 0.95
    """Decay of Muon's momentum per step."""

    muon_iterations: int = 5
    """Newton-Schulz iterations of Muon per step."""

    weight_decay: float = 0.1
    """Decoupled weight decay of the linear maps, multiplied by the learning rate each step."""

    embedding_weight_decay: float = 0.0
    """The same of byte embeddings and hash tables."""

    gradient_clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""

    z_loss: float = 0.0
    """Adds this times the squared log of the softmax's normaliser, mean over targets, to what is minimised."""

    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per step, such as 0.999; null for none."""

    max_nonfinite_steps: int = 10
    """Steps in a row whose loss or gradient is not finite after which training stops; each is left out and counted."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        steps = self.max_nonfinite_steps
        _require(steps >= 1, "optimizer.max_nonfinite_steps", steps, "at least 1")
        for name in ("learning_rate", "epsilon", "gradient_clip"):
            _require(_is_positive(getattr(self, name)), f"optimizer.{name}", getattr(self, name), _POSITIVE)
        for name in ("beta1", "beta2", "muon_momentum", "ema_decay"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, f"optimizer.{name}", value, "at least 0 and below 1")
        for name in ("weight_decay", "embedding_weight_decay", "z_loss"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"optimizer.{name}", value, "at least 0")
        iterations = self.muon_iterations
        _require(1 <= iterations <= 100, "optimizer.muon_iterations", iterations, "at least 1 and at most 100")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Length of training and the learning rate's course after a linear warm-up."""

    kind: ScheduleKind = ScheduleKind.COSINE
    """`cosine`, `wsd` (warm-up, stable, then a linear decay over the last part of the run), or `constant`."""

    total_steps: int = 1000
    """Optimizer steps in all; the data is read as many times over as that takes."""

    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    decay_fraction: float = 0.2
    """Last part of all steps over which `wsd` decays; the others do not read it."""

    min_lr_fraction: float = 0.1
    """Learning rate of the last step as a fraction of the peak; `constant` does not read it."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.total_steps >= 1, "schedule.total_steps", self.total_steps, "at least 1")
        _require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "at least 0")
        for name in ("decay_fraction", "min_lr_fraction"):
            fraction = getattr(self, name)
            _require(_is_fraction(fraction), f"schedule.{name}", fraction, "between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = 200
    """Steps between checkpoints; one is always written at the end, on SIGTERM (or a hang-up) and on SIGUSR1."""

    keep_last: int = 2
    """How many of the newest checkpoints stay on disk."""

    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this stay for ever, besides the newest; null for none."""

    asynchronous: bool = True
    """Write checkpoints while training goes on, from a copy in CPU memory; false saves the memory of that copy."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.every >= 1, "checkpoint.every", self.every, "at least 1")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")
        if self.keep_every is not None:
            rule = f"a multiple of checkpoint.every ({self.every}), or null"
            is_multiple = self.keep_every >= 1 and self.keep_every % self.every == 0
            _require(is_multiple, "checkpoint.keep_every", self.keep_every, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model is spread over processes, and what memory is traded for time; the numbers stay the same."""

    shard_ranks: int | None = None
    """Ranks over which one copy of the weights is sharded; null for all, a divisor of them for replicated shards."""

    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for the backward pass."""

    reduce_each_micro_batch: bool = False
    """Reduce gradients after every micro batch: less memory, more communication; false reduces once a step."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.NONE
    """What blocks recompute in the backward pass: `none`, `selective` (all but matrix products), `full`."""

    float8: bool = False
    """Run the matrices of the blocks in float8 (torchao); for GPUs of compute capability 8.9 and above."""

    timeout_seconds: float = 600.0
    """Seconds after which a rank that waits for another gives up."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.shard_ranks is not None:
            _require(self.shard_ranks >= 1, "parallel.shard_ranks", self.shard_ranks, "at least 1, or null")
        _require(_is_positive(self.timeout_seconds), "parallel.timeout_seconds", self.timeout_seconds, _POSITIVE)

    def shard_size(self, world_size: int) -> int:
        """Return over how many ranks one copy of the weights is sharded.

        Args:
            world_size: number of ranks.

        Raises:
            ConfigError: the ranks do not divide evenly into copies.
        """
        size = self.shard_ranks or world_size
        if world_size % size:
            raise ConfigError(
                f"parallel.shard_ranks is {size}, which does not divide {world_size} process(es): choose a divisor of "
                "their number, or null for all"
            )
        return size


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """When the held-out documents are evaluated during training."""

    every: int | None = 200
    """Steps between evaluations; null for the first and last only. Step 0 and the last are always evaluated."""

    max_bytes: int | None = None
    """Evaluate the first held-out documents up to this many bytes (at least one document); null for all."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.every is not None:
            _require(self.every >= 1, "evaluation.every", self.every, "at least 1, or null")
        if self.max_bytes is not None:
            _require(self.max_bytes >= 1, "evaluation.max_bytes", self.max_bytes, "at least 1, or null")


class WandbMode(StrEnum):
    """Whether metrics go to Weights & Biases too, and how."""

    OFF = "off"
    OFFLINE = "offline"
    ONLINE = "online"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics go besides `metrics.jsonl`, what the model is asked to write, and what is traced."""

    tensorboard: bool = False
    """Write TensorBoard event files into RUN/tensorboard too; needs `blt-train[tensorboard]`."""

    wandb: WandbMode = WandbMode.OFF
    """Tell Weights & Biases too: `off`, `offline` (files in RUN/wandb for `wandb sync`) or `online`; needs
    `blt-train[wandb]`."""

    wandb_project: str = "blt"
    """Project of Weights & Biases that the run belongs to."""

    update_norm: bool = True
    """Report the norm of each update; it needs room for a copy of the rank's weights during the update."""

    samples: tuple[str, ...] = ()
    """Prompts that the model continues during training, into RUN/samples.jsonl."""

    sample_every: int | None = None
    """Steps between samples; null for with every evaluation. The last step is always sampled."""

    sample_bytes: int = 200
    """Bytes that each sample is continued by, at most."""

    profile_step: int | None = None
    """First step that `torch.profiler` traces, into RUN/profile, one file per rank; null for none."""

    profile_steps: int = 3
    """How many steps are traced."""

    memory_snapshot: bool = False
    """Record every CUDA allocation of the traced steps, for pytorch.org/memory_viz; needs `profile_step`."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(bool(self.wandb_project), "logging.wandb_project", self.wandb_project, "a project's name")
        for name in ("sample_every", "profile_step"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"logging.{name}", value, "at least 1, or null")
        for name in ("sample_bytes", "profile_steps"):
            _require(getattr(self, name) >= 1, f"logging.{name}", getattr(self, name), "at least 1")
        if self.memory_snapshot and self.profile_step is None:
            raise ConfigError(
                "logging.memory_snapshot records the steps that are traced: name the first with logging.profile_step"
            )


class GpuName(StrEnum):
    """GPUs that `blt-train plan` knows."""

    A100 = "a100"
    H100 = "h100"
    H200 = "h200"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What `blt-train plan` assumes where there is no data and no GPU to look at; training does not read it."""

    gpu: GpuName = GpuName.H100
    """Kind of GPU: `h100` (80 GB), `h200` (141 GB) or `a100` (80 GB)."""

    gpus: int = 1
    """Number of GPUs."""

    mfu: float = 0.35
    """Model FLOP utilisation: share of the GPUs' peak that goes into the model's own arithmetic."""

    patch_length: float = 4.5
    """Mean patch length in tokens."""

    document_bytes: int = 4000
    """Mean length of a document in bytes."""

    utilisation: float = 0.97
    """Share of the batch's token positions that are no padding."""

    entropy_preset: str = "entropy-100m"
    """Preset of the entropy LM that scores the training text."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.gpus >= 1, "plan.gpus", self.gpus, "at least 1")
        for name in ("mfu", "utilisation"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"plan.{name}", value, "above 0 and at most 1")
        _require(self.document_bytes >= 1, "plan.document_bytes", self.document_bytes, "at least 1")
        rule = f"at least 1 and at most the document's {self.document_bytes} bytes"
        _require(1 <= self.patch_length <= self.document_bytes, "plan.patch_length", self.patch_length, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole training run."""

    run: str
    """Run directory: config, metrics and checkpoints are written there, and a second launch resumes from it."""

    model: ModelConfig
    """The model."""

    data: DataConfig
    """The data."""

    batch: BatchConfig = field(default_factory=BatchConfig)
    """The batch."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The schedule."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The checkpoints."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The evaluations."""

    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is told, where to, and what is traced."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes and memory."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    """What `blt-train plan` assumes."""

    precision: Precision = Precision.FLOAT32
    """Arithmetic of the forward and backward pass: `float32` or `bfloat16` (autocast; weights stay float32)."""

    entropy_model: str | None = None
    """Model directory of the entropy LM that scored the patched shards; copied into the run for generation."""

    device: str = "auto"
    """`auto` (CUDA where there is a GPU), `cpu` or `cuda`; under several processes each takes its own GPU."""

    seed: int = 0
    """Seed of the initial weights and of the order of documents."""

    threads: int | None = None
    """CPU threads per process for torch; null leaves torch's own choice, divided among the processes."""

    compile: bool = False
    """Compile the blocks with `torch.compile`; shapes are static, so each kind of block compiles once."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(bool(self.run), "run", self.run, "the path of a run directory")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2**63")
        if self.threads is not None:
            rule = f"at least 1 and at most {MAX_THREADS}, or null"
            _require(1 <= self.threads <= MAX_THREADS, "threads", self.threads, rule)
        if self.parallel.float8:
            rule = "bfloat16 where parallel.float8 is true"
            _require(self.precision is Precision.BFLOAT16, "precision", str(self.precision), rule)
