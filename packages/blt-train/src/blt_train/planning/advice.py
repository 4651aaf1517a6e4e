"""What to change where a run does not fit: the mildest changes first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from blt_train.config import ActivationCheckpointing, TrainConfig
from blt_train.errors import ConfigError
from blt_train.planning.planner import GPU_MEMORY, memory_bytes

#: More GPUs than this are not proposed.
_MOST_GPUS = 1024


def changes_that_fit(config: TrainConfig) -> list[str] | None:
    """Return the overrides with which a run fits its GPUs' memory.

    Args:
        config: of the run, as it is; nothing is proposed that it already has.

    Returns:
        `key=value` texts, none where it fits as it is; None where no number of GPUs up to 1,024 helps.
    """
    gpus = config.plan.gpus
    while gpus <= _MOST_GPUS:
        enlarged = dataclasses.replace(config, plan=dataclasses.replace(config.plan, gpus=gpus))
        for candidate in _candidates(enlarged):
            try:
                needed = memory_bytes(candidate)
            except ConfigError:
                # The batch does not divide among so many GPUs.
                continue
            if needed <= GPU_MEMORY[config.plan.gpu]:
                return _difference(config, candidate)
        gpus *= 2
    return None


def _candidates(config: TrainConfig) -> Iterator[TrainConfig]:
    """Yield variants of a config, from the one that costs least speed on."""
    modes = list(ActivationCheckpointing)
    modes = modes[modes.index(config.parallel.activation_checkpointing) :]
    halvings = [config.batch.sequences_per_micro_batch]
    while halvings[-1] > 1:
        halvings.append(halvings[-1] // 2)
    norms = list(dict.fromkeys([config.logging.update_norm, False]))
    shards = list(dict.fromkeys([config.parallel.shard_ranks, None]))
    reductions = list(dict.fromkeys([config.parallel.reduce_each_micro_batch, True]))
    if config.plan.gpus == 1:
        shards, reductions = shards[:1], reductions[:1]
    # The rightmost changes first.
    for shard, reduce, mode, micro, norm in itertools.product(shards, reductions, modes, halvings, norms):
        parallel = dataclasses.replace(
            config.parallel, shard_ranks=shard, reduce_each_micro_batch=reduce, activation_checkpointing=mode
        )
        batch = dataclasses.replace(config.batch, sequences_per_micro_batch=micro)
        logging = dataclasses.replace(config.logging, update_norm=norm)
        yield dataclasses.replace(config, parallel=parallel, batch=batch, logging=logging)


def _difference(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Return what makes one config of the other."""
    found = []
    for section in ("plan", "batch", "parallel", "logging"):
        old, new = getattr(before, section), getattr(after, section)
        for field in dataclasses.fields(old):
            value = getattr(new, field.name)
            if getattr(old, field.name) != value:
                text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
                found.append(f"{section}.{field.name}={text}")
    return found
