"""A run directory: its lock, its checkpoints, `latest`, and which checkpoints stay.

Whatever has a checkpoint's name is whole: one is written under a temporary name and renamed, and before one is removed
it is renamed back. Temporary names are never used twice, so that a process that outlives its run cannot write into the
files of the next one.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import uuid
from pathlib import Path
from typing import IO

from blt_train.config import CheckpointConfig
from blt_train.errors import CheckpointError
from blt_train.files import point_link, publish_directory

CHECKPOINTS_NAME = "checkpoints"
LATEST_NAME = "latest"
_TEMPORARY_PREFIX = ".tmp-"


def checkpoint_directory(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint that a path names: a checkpoint itself, or a run directory's latest.

    Args:
        path: a checkpoint or model directory, or a run directory.

    Raises:
        CheckpointError: there is neither.
    """
    directory = Path(path)
    latest = directory / LATEST_NAME
    if latest.is_symlink() and not latest.exists():
        raise CheckpointError(f"{latest}: points to a checkpoint that is gone; {_pointing(directory, None)}")
    if latest.exists():
        return latest.resolve()
    if (directory / "config.json").is_file():
        return directory.resolve()
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such checkpoint or run directory")
    raise CheckpointError(f"{directory}: holds no checkpoint; name a run directory or a checkpoint within it")


def checkpoint_name(step: int) -> str:
    """Return the name of a step's checkpoint.

    Args:
        step: optimizer steps done.
    """
    return f"step-{step:08d}"


def resume_another(checkpoint: Path) -> str:
    """Return how to go on from another checkpoint than this one, as the end of an error's sentence.

    Args:
        checkpoint: the directory of the one that cannot be used.
    """
    folder = checkpoint.absolute().parent
    if folder.name != CHECKPOINTS_NAME:
        return "copy the directory again, or name another checkpoint"
    run = folder.parent
    if not any(path.name != checkpoint.name for path in _finished(folder)):
        return "as the run has no other checkpoint, choose another run= to start anew"
    return f"to resume from another checkpoint, {_pointing(run, checkpoint.name)}"


def _pointing(run: Path, but: str | None) -> str:
    """Return how to point a run's `latest` to the newest checkpoint, but for one that is of no use."""
    others = [path.name for path in _finished(run / CHECKPOINTS_NAME) if path.name != but]
    command = f"ln -sfn {CHECKPOINTS_NAME}/{others[-1] if others else 'step-…'} {shlex.quote(str(run / LATEST_NAME))}"
    return f"point {LATEST_NAME} to one in {CHECKPOINTS_NAME}/ ({command})"


def _finished(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; directories that a user named otherwise are not ours."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]{8,}", path.name))


class RunDirectory:
    """A run directory and its checkpoints; only the first rank calls what writes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the directory; nothing is made yet.

        Args:
            path: the run directory.
        """
        self.path = Path(path)
        #: Where the checkpoints are.
        self.folder = self.path / CHECKPOINTS_NAME

    def lock(self) -> IO[str]:
        """Make the directory and claim it for this process until the returned file is closed.

        Raises:
            CheckpointError: another process trains in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise CheckpointError(f"{self.path}: another process is training here; choose another run=") from error
        return file

    def latest(self) -> Path | None:
        """Return the latest checkpoint's directory, or None where there is none yet.

        Raises:
            CheckpointError: `latest` points to nothing, or is no link.
        """
        link = self.path / LATEST_NAME
        if not link.is_symlink() and link.exists():
            raise CheckpointError(
                f"{link}: is no symbolic link, perhaps because a copy followed it; delete it to go on from the newest "
                f"checkpoint in {CHECKPOINTS_NAME}/"
            )
        return checkpoint_directory(self.path) if link.is_symlink() else None

    def restore_latest(self) -> None:
        """Point `latest` to the newest checkpoint where it is missing: lost in a copy, or not yet made when killed."""
        finished = self._finished()
        if finished and not os.path.lexists(self.path / LATEST_NAME):
            point_link(self.path / LATEST_NAME, f"{CHECKPOINTS_NAME}/{finished[-1].name}")

    def clean(self) -> None:
        """Remove what a killed process left: unfinished checkpoints, and finished ones that `latest` never reached."""
        latest = self.latest()
        for directory in self._finished():
            if latest is None or directory.name > latest.name:
                self._remove(directory)
        for directory in self.folder.glob(f"{_TEMPORARY_PREFIX}step-*"):
            shutil.rmtree(directory)

    def begin(self, step: int) -> Path:
        """Make a directory to write a checkpoint in.

        Args:
            step: of the checkpoint.

        Returns:
            The directory, of a name that was never used before.
        """
        directory = self._temporary(checkpoint_name(step))
        directory.mkdir()
        return directory

    def publish(self, written: Path, step: int, config: CheckpointConfig) -> Path:
        """Make a checkpoint durable, give it its name, move `latest` to it, and remove those that need not stay.

        Args:
            written: what `begin` gave, with all files in it.
            step: of the checkpoint.
            config: what stays.

        Returns:
            The checkpoint's directory.
        """
        directory = self.folder / checkpoint_name(step)
        publish_directory(written, directory)
        point_link(self.path / LATEST_NAME, f"{CHECKPOINTS_NAME}/{directory.name}")
        self.retain(config)
        return directory

    def retain(self, config: CheckpointConfig) -> None:
        """Remove the checkpoints that need not stay.

        Args:
            config: what stays.
        """
        for old in self._finished()[: -config.keep_last]:
            if config.keep_every is None or int(old.name.removeprefix("step-")) % config.keep_every:
                self._remove(old)

    def _finished(self) -> list[Path]:
        return _finished(self.folder)

    def _remove(self, directory: Path) -> None:
        """Remove a checkpoint so that, if that is interrupted, no half of it looks like one."""
        condemned = self._temporary(directory.name)
        directory.rename(condemned)
        shutil.rmtree(condemned)

    def _temporary(self, name: str) -> Path:
        return self.folder / f"{_TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex[:12]}"
