"""The quickstart's stages: each is one ordinary command line of the packages, run within this process.

Running the very commands that the report prints keeps the report honest, and every command already knows how to resume
and how to tell that its work is done. They run in this process only to save Python's and torch's start-up time.
"""

from __future__ import annotations

import importlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from blt_train.files import replace_text

_ENTRY_POINTS = {"blt-data": "blt_data.cli", "blt-patch": "blt_patcher.cli", "blt-train": "blt_train.cli"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command line of the pipeline."""

    title: str
    arguments: tuple[str, ...]
    """The program and its arguments."""

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(self.arguments)


class StageClock:
    """How long each command took when it did its work, kept over runs in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}
        if path.is_file():
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                read = {}
            if isinstance(read, dict):
                self._seconds = {str(line): float(value) for line, value in read.items()}

    def seconds(self, stage: Stage) -> float | None:
        """Return the seconds of a stage, None if it never ended here."""
        return self._seconds.get(stage.line)

    def record(self, stage: Stage, seconds: float) -> None:
        """Keep a stage's time; a later run that finds the work done does not replace it."""
        if self._seconds.setdefault(stage.line, round(seconds, 2)) == round(seconds, 2):
            replace_text(self._path, json.dumps(self._seconds, indent=1) + "\n")


def run_stages(stages: Sequence[Stage], clock: StageClock, *, first: int, total: int) -> None:
    """Run commands one after another.

    Args:
        stages: what to run.
        clock: told how long each took.
        first: number of the first of these stages, for the headings.
        total: number of all stages.

    Raises:
        SystemExit: a command failed; it has said why.
    """
    for number, stage in enumerate(stages, start=first):
        click.secho(f"\n[{number}/{total}] {stage.title}", bold=True, err=True)
        click.secho(f"      {stage.line}", dim=True, err=True)
        started = time.monotonic()
        run_command(stage)
        clock.record(stage, time.monotonic() - started)


def run_command(stage: Stage) -> None:
    """Run one command line in this process, as the program itself would.

    Args:
        stage: the command.

    Raises:
        SystemExit: the command failed; it has said why.
    """
    program, *arguments = stage.arguments
    command: click.Command = importlib.import_module(_ENTRY_POINTS[program]).main
    command.main(args=arguments, prog_name=program, standalone_mode=False)


def warmup_steps(steps: int) -> int:
    """Return the warm-up of a run of so many steps: a tenth."""
    return steps // 10
