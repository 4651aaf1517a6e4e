"""Memory of one GPU, in bytes, by part, at the moment of a step that needs most.

What is counted: weights, gradients, optimizer state and averages as they lie on one rank; weights gathered or cast for
computing; activations; and the work space of the steps that have a large one. What is not: the CUDA context, NCCL's
buffers and fragmentation, some gigabytes, for which the memory of a GPU is taken as the round figure of its name (an
H100 of 80 GB has 85.0e9 bytes).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from blt_model import BLTConfig
from blt_model import ModelConfig as ArchitectureConfig
from blt_train.config import ActivationCheckpointing, OptimizerName, Precision, TrainConfig
from blt_train.optim.groups import Member, Role, members
from blt_train.parallel.seeding import meta_model
from blt_train.parallel.sharding import units
from blt_train.planning.activations import ActivationModel

_FLOAT32 = 4
_BFLOAT16 = 2
#: Units whose weights are there at once under FSDP2: the one at work, the next, and the one before, not freed yet.
_UNITS_IN_FLIGHT = 3
#: Copies of a matrix that Newton-Schulz iterations hold in bfloat16 at once.
_MUON_COPIES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro batch of one rank, and how many a step has."""

    tokens: int
    """Positions, padding included."""

    patches: int
    """Patches, empty ones included; 0 for the byte LM."""

    micro_batches: int
    """Per step and rank."""


class MemoryModel:
    """Memory of one rank of a run."""

    def __init__(self, architecture: ArchitectureConfig, config: TrainConfig, world_size: int) -> None:
        """Count the parameters; none is allocated.

        Args:
            architecture: of the model.
            config: of the run.
            world_size: number of ranks.

        Raises:
            ConfigError: the ranks do not divide into copies of the weights.
        """
        self._config = config
        self._world_size = world_size
        self._shard_size = config.parallel.shard_size(world_size)
        self._is_half = config.precision is Precision.BFLOAT16
        self._members, self._units = _sizes(architecture)
        self._tables = {member.name for member in self._members if "hash_embedding" in member.name.split(".")}
        self._table_width, self._lookups = 0, 0
        if isinstance(architecture, BLTConfig):
            self._table_width = architecture.encoder.dim
            self._lookups = architecture.hash_embedding.num_tables
        self._activations = ActivationModel(
            architecture=architecture, compute_bytes=_BFLOAT16 if self._is_half else _FLOAT32, is_cpu=False
        )

    def state(self) -> dict[str, int]:
        """Return the bytes that are there at all times, by part: `weights`, `optimizer`, `average`, `hash tables`.

        The last has everything of the tables. What the optimizer counts its steps with is left out: 4 bytes for each
        parameter tensor.
        """
        tables = sum(self._rows(member) for member in self._members if member.name in self._tables)
        others = [member for member in self._members if member.name not in self._tables]
        average = _FLOAT32 if self._config.optimizer.ema_decay is not None else 0
        optimizer = sum(self._rows(member) * self._moment_bytes(member.role) for member in others)
        weights = sum(self._rows(member) for member in others)
        return {
            "weights": _FLOAT32 * weights,
            "optimizer": optimizer,
            "average": average * weights,
            "hash tables": tables * (_FLOAT32 + self._moment_bytes(Role.EMBEDDING) + average),
        }

    def phases(self, batch: Batch) -> dict[str, dict[str, int]]:
        """Return the bytes by part at the moments of a step that can need most.

        Args:
            batch: of one rank.

        Returns:
            `forward` (the last forward pass of the step has ended), `backward` (the last backward pass has ended) and
            `update`.
        """
        state, gradients = self.state(), self._gradients()
        held = self.activations(self._config.parallel.activation_checkpointing, batch)
        is_later = batch.micro_batches > 1
        kept = self._kept_gradients() if is_later else 0
        # One table's gradient all the time: later micro batches add to it in place.
        table_gradient = gradients["table"] if is_later else 0
        return {
            "forward": {
                **state,
                "hash tables": state["hash tables"] + table_gradient,
                "gradients": kept,
                **held,
                **self._cast_weights(),
                "work space": self._backward_workspace(batch),
            },
            "backward": {
                **state,
                "hash tables": state["hash tables"] + gradients["table"],
                "gradients": max(kept, gradients["others"]),
                **self._cast_weights(),
                "work space": self._table_workspace(batch),
            },
            "update": {
                **state,
                "hash tables": state["hash tables"] + gradients["table"],
                "gradients": gradients["others"],
                "work space": self._update_workspace(),
            },
        }

    def activations(self, mode: ActivationCheckpointing, batch: Batch) -> dict[str, int]:
        """Return what a forward pass keeps: `activations` and `logits`.

        Args:
            mode: what blocks recompute.
            batch: of one rank.
        """
        held = self._activations.held(mode, tokens=batch.tokens, patches=batch.patches)
        logits = held.pop("logits")
        return {"activations": sum(held.values()), "logits": logits}

    def _rows(self, member: Member) -> int:
        """Numbers of a parameter on the rank that has most."""
        ranks = self._world_size if member.name in self._tables else self._shard_size
        rows, *rest = member.parameter.shape
        return -(-rows // ranks) * math.prod(rest)

    def _moment_bytes(self, role: Role) -> int:
        """Bytes of optimizer state for each number."""
        is_muon = self._config.optimizer.name is OptimizerName.MUON
        return _FLOAT32 if is_muon and role is Role.MATRIX else 2 * _FLOAT32

    def _gradients(self) -> dict[str, int]:
        """Bytes of the gradients that the update reads, those of hash tables by themselves."""
        table = sum(self._rows(member) for member in self._members if member.name in self._tables)
        others = sum(self._rows(member) for member in self._members if member.name not in self._tables)
        return {"table": _FLOAT32 * table, "others": _FLOAT32 * others}

    def _kept_gradients(self) -> int:
        """Bytes of gradients, but those of hash tables, between micro batches: whole where they are summed last."""
        if self._world_size == 1 or self._config.parallel.reduce_each_micro_batch:
            return self._gradients()["others"]
        return _FLOAT32 * self._dense_count()

    def _dense_count(self) -> int:
        """Numbers of all parameters but the hash tables."""
        return sum(member.parameter.numel() for member in self._members if member.name not in self._tables)

    def _cast_weights(self) -> dict[str, int]:
        """Weights that are there once more: cast for computing, and under several ranks gathered."""
        width = _BFLOAT16 if self._is_half else _FLOAT32
        if self._world_size == 1:
            if not self._is_half:
                return {"weights cast": 0}
            # Autocast keeps what it has cast for the backward pass; recomputed blocks cast anew, one at a time.
            cast = [member for member in self._members if member.role in (Role.MATRIX, Role.HEAD)]
            if self._config.parallel.activation_checkpointing is not ActivationCheckpointing.NONE:
                cast = [member for member in cast if "blocks" not in member.name.split(".")]
            return {"weights cast": width * sum(member.parameter.numel() for member in cast)}
        largest = max(self._units)
        if not self._config.parallel.reshard_after_forward:
            gathered = width * self._dense_count()
        else:
            root = self._dense_count() - sum(self._units)
            gathered = width * (root + _UNITS_IN_FLIGHT * largest)
        # A unit's gradients wait in float32 to be summed over ranks while the next unit's are made.
        return {"weights gathered": gathered + 2 * _FLOAT32 * largest}

    def _backward_workspace(self, batch: Batch) -> int:
        """Bytes that the first block of a backward pass needs besides what the forward pass kept."""
        sizes = {"tokens": batch.tokens, "patches": batch.patches}
        recomputed = 0
        if self._config.parallel.activation_checkpointing is not ActivationCheckpointing.NONE:
            recomputed = self._activations.largest_block(**sizes)
        return recomputed + self._activations.backward_workspace(**sizes)

    def _table_workspace(self, batch: Batch) -> int:
        """Bytes of the gradients of the rows that a rank asked others for, at the end of its backward pass."""
        if self._world_size == 1 or not self._tables:
            return 0
        rows = sum(member.parameter.shape[0] for member in self._members if member.name in self._tables)
        return 2 * _FLOAT32 * self._table_width * min(rows, batch.tokens * self._lookups)

    def _update_workspace(self) -> int:
        """Bytes that the update needs: AdamW's is fused and needs none."""
        copies = 0
        if self._config.logging.update_norm:
            copies = _FLOAT32 * sum(self._rows(member) for member in self._members)
        if self._config.optimizer.name is not OptimizerName.MUON:
            return copies
        largest = max(member.parameter.numel() for member in self._members if member.role is Role.MATRIX)
        return copies + _BFLOAT16 * _MUON_COPIES * largest


@functools.lru_cache(maxsize=64)
def _sizes(architecture: ArchitectureConfig) -> tuple[tuple[Member, ...], tuple[int, ...]]:
    """Return all parameters, without memory, and the numbers in each unit that is gathered at once."""
    model, _ = meta_model(architecture)
    return tuple(members(model)), tuple(sum(_count(module) for module in unit) for unit in units(model))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def total(parts: Mapping[str, int]) -> int:
    """Return the sum of the bytes of all parts.

    Args:
        parts: by name.
    """
    return sum(parts.values())
