"""A program whose processes read a checkpoint on one mesh and write it again, as any trainer would.

    python -m tests.blt_train.checkpoint_ranks ROOT STEP PROCESSES/SHARD_RANKS[/BYTES]…

ROOT/run has a checkpoint of STEP. For each PROCESSES/SHARD_RANKS in turn so many processes read the latest checkpoint
into a model sharded over so many ranks, and write it as the next step, the tensors being changed as soon as saving
returns. With BYTES the last process may write files of so many bytes only, as on a full disk. Each process tells its
error.
"""

from __future__ import annotations

import functools
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tests.blt_train.ranks import run_ranks
from tests.blt_train.samples import blt_config
from torch import Tensor

from blt_train.checkpoint import (
    RunDirectory,
    Saver,
    Section,
    load_optimizer,
    load_section,
    optimizer_tensors,
    read_trainer_state,
)
from blt_train.config import CheckpointConfig
from blt_train.errors import CheckpointError
from blt_train.inputs import architecture_of_config
from blt_train.optim import make_optimizer
from blt_train.parallel.building import empty_model
from blt_train.parallel.mesh import make_mesh
from blt_train.parallel.rows import local_rows
from blt_train.runtime import open_runtime


def copy_latest(root: Path, step: int, shard_ranks: int, limit: int | None) -> None:
    """One process's part: read the latest checkpoint, write it as `step`."""
    config = blt_config(root, "run", "threads=1")
    with open_runtime(config) as runtime:
        run = RunDirectory(config.run)
        latest = run.latest()
        if latest is None:
            sys.exit("there is no checkpoint")
        architecture = architecture_of_config(config)
        mesh = make_mesh(runtime.device, runtime.world_size, shard_ranks)
        model, _ = empty_model(architecture, config, runtime.device, mesh)
        load_section(latest, Section.MODEL, model.state_dict())
        optimizer = make_optimizer(model, config.optimizer)
        load_optimizer(latest, model, optimizer)
        sections: Mapping[Section, Mapping[str, Tensor]] = {
            Section.MODEL: model.state_dict(),
            Section.OPTIMIZER: optimizer_tensors(model, optimizer),
        }
        if limit is not None and runtime.rank == runtime.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        state = read_trainer_state(latest)
        values = {name: getattr(state, name) for name in ("config", "data", "entropy_model", "packages")}
        with Saver(run, runtime, CheckpointConfig(keep_last=10)) as saver:
            saver.save(sections, type(state)(step=step, processes=runtime.world_size, **values), architecture)
            with torch.no_grad():
                for tensors in sections.values():
                    for tensor in tensors.values():
                        local_rows(tensor).fill_(float("nan"))


def main() -> None:
    """Run all jobs."""
    root, first_step, *layouts = sys.argv[1:]

    def job(step: int, shard_ranks: int, limit: int | None) -> None:
        try:
            copy_latest(Path(root), step, shard_ranks, limit)
        except CheckpointError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(3)

    for step, layout in enumerate(layouts, start=int(first_step) + 1):
        processes, shard_ranks, *limit = map(int, layout.split("/"))
        body = functools.partial(job, step, shard_ranks, limit[0] if limit else None)
        sys.stdout.write(f"{layout} {run_ranks(processes, body)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
