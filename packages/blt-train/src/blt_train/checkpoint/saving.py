"""Writing checkpoints while training goes on.

`Saver.save` copies what this process is to write into CPU memory, which is all that training waits for; a thread writes
the copies to disk. A checkpoint comes into being in three stages, after each of which all processes agree that it went
well: the first one makes a directory, all write their files and force them to disk, and only then does the first one
rename the directory and move `latest`. If one of them fails, no process goes on to the next stage, every process learns
the same reason, and training stops.

They agree through a process group of their own, over gloo, which threads may use while training computes in others.
Marker files would do without, but on a network file system one machine sees another's new files only after some
seconds, and nobody would notice that the writer of a missing marker is dead; a broken connection is noticed at once.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blt_model import ModelConfig
from blt_model.weights.native import CONFIG_FILE, config_text, weights_metadata
from blt_model.weights.section_writing import SAVE_KEY, Piece, section_file_name, write_section_file
from blt_train.checkpoint.directory import LATEST_NAME, RunDirectory, checkpoint_name
from blt_train.checkpoint.sections import Section, owned_pieces
from blt_train.checkpoint.snapshot import SnapshotMemory
from blt_train.checkpoint.state import TRAINER_NAME, TrainerState
from blt_train.config import CheckpointConfig
from blt_train.errors import CheckpointError
from blt_train.files import naming
from blt_train.runtime import Runtime

#: How long one process may write while the others wait; one that dies is noticed at once.
_TIMEOUT = timedelta(hours=2)
#: How long a process that fails for another reason lets a checkpoint that is being written come to its end, in seconds.
_LAST_PATIENCE = 30.0
#: Elements that are examined at a time.
_EXAMINED = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveFigures:
    """What checkpoints have cost since they were last asked for."""

    seconds: float = 0.0
    """Time for which training stood still."""

    bytes: int = 0
    """Size of the checkpoints that were completed, over all processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One checkpoint to write."""

    state: TrainerState
    architecture: ModelConfig
    pieces: Mapping[str, list[Piece]]
    """What this process writes, by section."""


class Saver:
    """Writes the checkpoints of a run; a context manager, entered by every process.

    Leaving it waits for the checkpoint that is being written.
    """

    def __init__(self, run: RunDirectory, runtime: Runtime, config: CheckpointConfig) -> None:
        """Join the other processes.

        Args:
            run: locked by the first process.
            runtime: this process's place; every process must make a saver at the same point.
            config: of the checkpoints.
        """
        self._run, self._runtime, self._config = run, runtime, config
        self._group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT) if runtime.world_size > 1 else None
        self._memory = SnapshotMemory()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._directory: Path | None = None
        self._seconds = 0.0
        self._bytes = 0
        self._counting = threading.Lock()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            # What is being written is sound whatever went wrong since; the first error is the one to tell.
            self._thread.join(_LAST_PATIENCE)
            if self._thread.is_alive():
                return
        self._memory.release()

    @property
    def has_failed(self) -> bool:
        """Whether this process knows that a checkpoint could not be written; `wait` says why."""
        return self._error is not None

    def save(
        self, sections: Mapping[Section, Mapping[str, Tensor]], state: TrainerState, architecture: ModelConfig
    ) -> None:
        """Begin to write a checkpoint, after the one before it is complete; every process calls this.

        With `checkpoint.asynchronous` this returns when the tensors are copied, and they may change; otherwise when the
        checkpoint is complete.

        Args:
            sections: tensors by name; `model` is needed for a model directory.
            state: the rest.
            architecture: of the model.

        Raises:
            CheckpointError: this checkpoint (or the one before, if it is being written still) could not be written.
            ValueError: a tensor is sharded otherwise than by rows.
        """
        self.wait()
        started = time.perf_counter()
        state = dataclasses.replace(state, save=checkpoint_name(state.step))
        rank, world_size = self._runtime.rank, self._runtime.world_size
        pieces = {
            str(section): owned_pieces(tensors, rank=rank, world_size=world_size)
            for section, tensors in sections.items()
        }
        if self._config.asynchronous:
            job = _Job(state=state, architecture=architecture, pieces=self._memory.take(pieces))
            self._thread = threading.Thread(target=self._work, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._work(_Job(state=state, architecture=architecture, pieces=pieces))
        self._seconds += time.perf_counter() - started
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            CheckpointError: it could not be written, here or by another process.
        """
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._seconds += time.perf_counter() - started
        if self._error is not None:
            raise self._error

    def take_figures(self) -> SaveFigures:
        """Return what checkpoints have cost since the last call."""
        with self._counting:
            figures = SaveFigures(seconds=self._seconds, bytes=self._bytes)
            self._seconds, self._bytes = 0.0, 0
        return figures

    def _work(self, job: _Job) -> None:
        """Write a checkpoint; what goes wrong is kept for `wait`."""
        try:
            stages = (lambda: self._begin(job.state.step), lambda: self._write(job), lambda: self._publish(job))
            size = sum(self._together(job, stage) for stage in stages)
            with self._counting:
                self._bytes += size
        # Whatever it is, training must hear of it.
        except BaseException as error:
            self._error = error
            if self._runtime.is_main and self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)

    def _together(self, job: _Job, stage: Callable[[], int]) -> int:
        """Run one stage on every process; raise the same error on all of them if it fails on any.

        Args:
            job: the checkpoint.
            stage: returns the bytes that it wrote.

        Returns:
            The bytes that all processes wrote.
        """
        reason, size = None, 0
        try:
            size = stage()
        except (OSError, CheckpointError) as error:
            reason = str(error)
        outcomes = self._gather({"reason": reason, "bytes": size, "directory": self._name()})
        for rank, outcome in enumerate(outcomes):
            if outcome["reason"] is not None:
                raise CheckpointError(self._sentence(job.state.step, rank, outcome["reason"]))
        self._directory = self._run.folder / outcomes[0]["directory"]
        return sum(int(outcome["bytes"]) for outcome in outcomes)

    def _gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what all processes have to say, by rank."""
        if self._group is None:
            return [mine]
        outcomes: list[Any] = [None] * self._runtime.world_size
        dist.all_gather_object(outcomes, mine, group=self._group)
        return outcomes

    def _name(self) -> str:
        return "" if self._directory is None else self._directory.name

    def _begin(self, step: int) -> int:
        """Make the directory, on the first process."""
        if self._runtime.is_main:
            self._directory = self._run.begin(step)
        return 0

    def _write(self, job: _Job) -> int:
        """Write this process's files; return their size."""
        if self._directory is None:
            raise RuntimeError("the directory is made first")
        size = 0
        save = {SAVE_KEY: checkpoint_name(job.state.step)}
        for section, pieces in job.pieces.items():
            _refuse_nonfinite(section, pieces)
            metadata = weights_metadata(job.architecture) if section == Section.MODEL else {}
            name = section_file_name(section, self._runtime.rank, self._runtime.world_size)
            size += write_section_file(self._directory / name, pieces, {**metadata, **save})
        return size

    def _publish(self, job: _Job) -> int:
        """Complete the checkpoint, on the first process; return the size of what it adds."""
        if not self._runtime.is_main or self._directory is None:
            return 0
        texts = {CONFIG_FILE: config_text(job.architecture), TRAINER_NAME: job.state.to_text()}
        for name, text in texts.items():
            with naming(self._directory / name):
                (self._directory / name).write_text(text, encoding="utf-8")
        self._run.publish(self._directory, job.state.step, self._config)
        return sum(len(text.encode()) for text in texts.values())

    def _sentence(self, step: int, rank: int, reason: str) -> str:
        """Return what a user is told when a checkpoint fails."""
        latest = self._run.path / LATEST_NAME
        who = f" by process {rank + 1} of {self._runtime.world_size}" if self._runtime.world_size > 1 else ""
        resume = f"go on from {latest.readlink().name}" if latest.is_symlink() else "start anew"
        return (
            f"{self._run.path}: the checkpoint of step {step} could not be written{who} ({reason}); mend that and run "
            f"the same command again to {resume}"
        )


def _refuse_nonfinite(section: str, pieces: list[Piece]) -> None:
    """Refuse broken numbers: a checkpoint with them would replace a sound one.

    Raises:
        CheckpointError: a tensor holds an infinity or NaN.
    """
    for piece in pieces:
        if not piece.tensor.is_floating_point():
            continue
        for part in torch.split(piece.tensor.reshape(-1), _EXAMINED):
            if not bool(torch.isfinite(part).all()):
                raise CheckpointError(
                    f"{piece.name} of its section {section} is no longer finite: begin anew with a lower "
                    "optimizer.learning_rate or a longer schedule.warmup_steps"
                )
