"""What a run is given, opened and checked: model config, shards, entropy model, and how they fit each other."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blt_data.shards import ShardDirectory, ShardKind
from blt_model import ByteLM, ByteLMConfig, ModelError, preset
from blt_model import ModelConfig as ArchitectureConfig
from blt_model.weights.native import load_model, model_fingerprint
from blt_train.checkpoint import checkpoint_directory
from blt_train.config import TrainConfig
from blt_train.documents import DocumentTable, read_documents
from blt_train.errors import ConfigError
from blt_train.plan import Capacity, derive_capacity

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Everything that training reads."""

    config: TrainConfig
    """The config with the derived capacities filled in."""

    architecture: ArchitectureConfig
    """Config of the model to build."""

    directory: ShardDirectory
    """Training shards."""

    documents: DocumentTable
    """Their documents."""

    capacity: Capacity
    """Of one training sequence."""

    holdout: DocumentTable | None
    """Held-out documents; None for no evaluation."""

    entropy_model: ByteLM | None
    """The model that scored the shards, if given."""

    entropy_fingerprint: str | None
    """Fingerprint of the model that scored the shards; None where no model did."""


def architecture_of_config(config: TrainConfig) -> ArchitectureConfig:
    """Return the model config that a training config names.

    Raises:
        ConfigError: preset or override is unknown or wrong.
    """
    try:
        return preset(config.model.preset, **config.model.overrides)
    except ModelError as error:
        raise ConfigError(f"model: {error}") from error


def needed_kind(architecture: ArchitectureConfig) -> ShardKind:
    """Return the kind of shards that a model is trained on."""
    return ShardKind.BYTES if isinstance(architecture, ByteLMConfig) else ShardKind.PATCHED


def open_shards(
    path: str | os.PathLike[str], architecture: ArchitectureConfig, *, verify: bool = False
) -> ShardDirectory:
    """Open a shard directory of the kind that a model needs.

    Args:
        path: the directory.
        architecture: of the model.
        verify: recompute every checksum first.

    Raises:
        InputError: it is missing or damaged, or of the wrong kind (from `blt_data`, naming directory and mend).
    """
    return ShardDirectory.open(path, kind=needed_kind(architecture), verify=verify)


def check_launch(config: TrainConfig, world_size: int) -> ArchitectureConfig:
    """Check, in well under a second, whatever can be wrong before processes are started.

    Args:
        config: of the run.
        world_size: number of processes.

    Returns:
        The model config.

    Raises:
        ConfigError: a field is at odds with another, or with the number of processes.
        InputError: data is missing or of the wrong kind.
    """
    architecture = architecture_of_config(config)
    config.batch.micro_batches(world_size)
    if isinstance(architecture, ByteLMConfig):
        for name, value in (
            ("data.sequence_patches", config.data.sequence_patches),
            ("entropy_model", config.entropy_model),
        ):
            if value is not None:
                raise ConfigError(f"{name} is set, but {config.model.preset} is a byte LM without patches: remove it")
    open_shards(config.data.train, architecture)
    if config.data.holdout is not None:
        open_shards(config.data.holdout, architecture)
    return architecture


def open_inputs(config: TrainConfig, *, verify: bool) -> Inputs:
    """Open everything that a run reads and fill in what the config leaves to the data.

    Args:
        config: of the run.
        verify: recompute the checksums of the shards, if the config wants it.

    Raises:
        ConfigError: parts do not fit each other.
        InputError: data is missing, damaged, or of the wrong kind.
    """
    architecture = architecture_of_config(config)
    verify = verify and config.data.verify
    directory = open_shards(config.data.train, architecture, verify=verify)
    documents = read_documents(directory)
    capacity = derive_capacity(
        documents,
        tokens=config.data.sequence_tokens,
        patches=config.data.sequence_patches,
        max_documents=config.data.sequence_documents,
        seed=config.seed,
    )
    holdout_directory = None
    if config.data.holdout is not None:
        holdout_directory = open_shards(config.data.holdout, architecture, verify=verify)
        _check_same_patching(directory, holdout_directory)
    fingerprint = scoring_fingerprint(directory.manifest.provenance)
    entropy_model = _open_entropy_model(config, fingerprint, directory) if config.entropy_model is not None else None
    if fingerprint is not None and entropy_model is None:
        log.warning("entropy_model is not set: generation from this run will need --entropy-model")
    resolved = dataclasses.replace(
        config.data, sequence_patches=capacity.patches or None, sequence_documents=capacity.documents
    )
    return Inputs(
        config=dataclasses.replace(config, data=resolved),
        architecture=architecture,
        directory=directory,
        documents=documents,
        capacity=capacity,
        holdout=read_documents(holdout_directory) if holdout_directory is not None else None,
        entropy_model=entropy_model,
        entropy_fingerprint=fingerprint,
    )


def scoring_fingerprint(provenance: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the entropy model that scored patched shards; None where no model did.

    Args:
        provenance: of the shards.
    """
    model = provenance.get("entropy_model")
    return str(model["fingerprint"]) if isinstance(model, Mapping) else None


def open_entropy_model(path: str | os.PathLike[str], fingerprint: str | None, *, data: str) -> ByteLM:
    """Load an entropy model and check that it is the one that scored some shards.

    Args:
        path: model directory, checkpoint or run directory.
        fingerprint: of the model that scored them; None where no model did.
        data: the shards' name, for messages.

    Raises:
        ConfigError: it is another model, or none is needed.
        CheckpointError: there is no model.
    """
    if fingerprint is None:
        raise ConfigError(f"{path}: the patches of {data} were made without an entropy model: leave it out")
    model = load_model(checkpoint_directory(path))
    if not isinstance(model, ByteLM):
        raise ConfigError(f"{path}: holds a BLT, not an entropy model; name the byte LM that scored {data}")
    found = model_fingerprint(model)
    if found != fingerprint:
        raise ConfigError(
            f"{path}: is not the entropy model that scored {data} (fingerprint {found[:12]}, needed "
            f"{fingerprint[:12]}): name that model, or run blt-patch precompute again with this one"
        )
    return model


def _open_entropy_model(config: TrainConfig, fingerprint: str | None, directory: ShardDirectory) -> ByteLM:
    return open_entropy_model(Path(str(config.entropy_model)), fingerprint, data=str(directory.path))


def _check_same_patching(train: ShardDirectory, holdout: ShardDirectory) -> None:
    """Refuse held-out documents that were patched by another rule: their bits per byte would mislead."""
    for key in ("scheme", "entropy_model"):
        if train.manifest.provenance.get(key) != holdout.manifest.provenance.get(key):
            raise ConfigError(
                f"{holdout.path}: was patched with another {key.replace('_', ' ')} than {train.path}: run blt-patch "
                "precompute on both with the same options"
            )
