"""What a run is given, opened and checked: model config, shards, entropy model, and how they fit each other."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blt_data.shards import Manifest, ShardDirectory, ShardKind
from blt_model import ByteLM, ByteLMConfig, ModelError, preset
from blt_model import ModelConfig as ArchitectureConfig
from blt_model.weights.native import load_model, model_fingerprint
from blt_train.checkpoint import checkpoint_directory
from blt_train.config import TrainConfig
from blt_train.documents import DocumentTable, read_documents
from blt_train.errors import ConfigError
from blt_train.groups import ShardGroups
from blt_train.observers import check_observers
from blt_train.plan import Capacity, derive_capacity
from blt_train.sequence_counts import counts_key, read_counts
from blt_train.sequences import SequenceStream
from blt_train.source_stream import SourceStream

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source of the training data, opened."""

    weight: float
    """Share of the sequences, all sources' shares together being 1."""

    groups: ShardGroups
    """Its shards."""

    @property
    def manifest(self) -> Manifest:
        """Manifest of the shard directory."""
        return self.groups.directory.manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Everything that training reads."""

    config: TrainConfig
    """The config with the derived capacities filled in."""

    architecture: ArchitectureConfig
    """Config of the model to build."""

    sources: Mapping[str, Source]
    """Training data by source; a single directory is named `train`."""

    capacity: Capacity
    """Of one training sequence."""

    holdouts: Mapping[str, DocumentTable]
    """Held-out documents by source; those of a single directory are named `holdout`. Empty for no evaluation."""

    entropy_model: ByteLM | None
    """The model that scored the shards, if given."""

    entropy_fingerprint: str | None
    """Fingerprint of the model that scored the shards; None where no model did."""

    @property
    def directory(self) -> ShardDirectory:
        """One of the training directories: kind and patching are the same in all."""
        return next(iter(self.sources.values())).groups.directory

    def data_state(self) -> dict[str, Any]:
        """Return what a checkpoint says of the data: if this is equal, so is the data and its order.

        Returns:
            Plain values: `kind` of the shards, and `sources`: by name the `fingerprint` and `provenance` of the shard
            directory, the `weight` (of all sources together 1), and `group_documents`, null where all documents are
            shuffled together.
        """
        return {
            "kind": str(self.directory.kind),
            "sources": {
                name: {
                    "fingerprint": source.manifest.fingerprint(),
                    "provenance": dict(source.manifest.provenance),
                    "weight": source.weight,
                    "group_documents": source.groups.group_documents,
                }
                for name, source in sorted(self.sources.items())
            },
        }

    def open_stream(self, run: Path | None = None) -> SequenceStream:
        """Return the sequences of training.

        Args:
            run: run directory, in which earlier launches may have kept what they knew of the sequences; None for none.
        """
        keys = {
            name: counts_key(
                {
                    "fingerprint": source.manifest.fingerprint(),
                    "group_documents": source.groups.group_documents,
                    "capacity": dataclasses.asdict(self.capacity),
                    "seed": self.config.seed,
                }
            )
            for name, source in self.sources.items()
        }
        counts = read_counts(run, keys) if run is not None else {name: [] for name in keys}
        streams = {
            name: SourceStream(source.groups, self.capacity, seed=self.config.seed, counts=counts[name])
            for name, source in self.sources.items()
        }
        weights = {name: source.weight for name, source in self.sources.items()}
        return SequenceStream(streams, weights=weights, seed=self.config.seed, keys=keys)


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
    if Path(config.run).exists() and not Path(config.run).is_dir():
        raise ConfigError(f"run: {config.run} is a file, not a directory; choose another run=")
    architecture = architecture_of_config(config)
    config.batch.micro_batches(world_size)
    config.parallel.shard_size(world_size)
    check_observers(config.logging)
    if isinstance(architecture, ByteLMConfig):
        for name, value in (
            ("data.sequence_patches", config.data.sequence_patches),
            ("entropy_model", config.entropy_model),
        ):
            if value is not None:
                raise ConfigError(f"{name} is set, but {config.model.preset} is a byte LM without patches: remove it")
    for source in config.data.training_sources.values():
        open_shards(source.train, architecture)
        if source.holdout is not None:
            open_shards(source.holdout, architecture)
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
    sources = _open_sources(config, architecture, verify=verify)
    directories = {name: source.groups.directory for name, source in sources.items()}
    first = next(iter(directories.values()))
    holdouts: dict[str, DocumentTable] = {}
    for name, named in config.data.training_sources.items():
        _check_same_patching(first, directories[name])
        if named.holdout is not None:
            holdout = open_shards(named.holdout, architecture, verify=verify)
            _check_same_patching(first, holdout)
            holdouts[name if config.data.sources else "holdout"] = read_documents(holdout)
    capacity = _derive_capacity(config, sources)
    fingerprint = scoring_fingerprint(first.manifest.provenance)
    entropy_model = _open_entropy_model(config, fingerprint, first) if config.entropy_model is not None else None
    if fingerprint is not None and entropy_model is None:
        log.warning("entropy_model is not set: generation from this run will need --entropy-model")
    resolved = dataclasses.replace(
        config.data, sequence_patches=capacity.patches or None, sequence_documents=capacity.documents
    )
    return Inputs(
        config=dataclasses.replace(config, data=resolved),
        architecture=architecture,
        sources=sources,
        capacity=capacity,
        holdouts=holdouts,
        entropy_model=entropy_model,
        entropy_fingerprint=fingerprint,
    )


def _open_sources(config: TrainConfig, architecture: ArchitectureConfig, *, verify: bool) -> dict[str, Source]:
    """Open the training shards; of those that are read group by group, each is verified when it is first read."""
    named = config.data.training_sources
    total = math.fsum(source.weight for source in named.values())
    opened = {}
    for name, source in named.items():
        directory = open_shards(source.train, architecture)
        groups = ShardGroups(directory, seed=config.seed, group_documents=config.data.group_documents, verify=verify)
        if verify and groups.is_one_group:
            open_shards(source.train, architecture, verify=True)
        opened[name] = Source(weight=source.weight / total, groups=groups)
    return opened


def _derive_capacity(config: TrainConfig, sources: Mapping[str, Source]) -> Capacity:
    """Return a capacity with which every source fills its sequences well, judged by its first group."""
    data = config.data
    if data.sequence_documents is not None and data.sequence_patches is not None:
        # All is said: a large corpus need not be looked into.
        return Capacity(tokens=data.sequence_tokens, patches=data.sequence_patches, documents=data.sequence_documents)
    derived = [
        derive_capacity(
            source.groups.documents(0, 0),
            tokens=data.sequence_tokens,
            patches=data.sequence_patches,
            max_documents=data.sequence_documents,
            seed=config.seed,
        )
        for source in sources.values()
    ]
    return Capacity(
        tokens=data.sequence_tokens,
        patches=max(capacity.patches for capacity in derived),
        documents=max(capacity.documents for capacity in derived),
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


def _check_same_patching(train: ShardDirectory, other: ShardDirectory) -> None:
    """Refuse documents that were patched by another rule: the model would see two, and bits per byte would mislead."""
    for key in ("scheme", "entropy_model"):
        if train.manifest.provenance.get(key) != other.manifest.provenance.get(key):
            raise ConfigError(
                f"{other.path}: was patched with another {key.replace('_', ' ')} than {train.path}: run blt-patch "
                "precompute on both with the same options"
            )
