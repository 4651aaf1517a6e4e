"""Traces of a few steps by `torch.profiler`, and records of CUDA memory, when a config asks for them.

Each rank writes a Chrome trace (chrome://tracing, ui.perfetto.dev) of its own into RUN/profile; the first rank also
writes down and logs the operators that took the most time. Tracing slows the traced steps, and so their speeds in the
metrics; the numbers of training stay the same.
"""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

import click
import torch
from torch.profiler import ProfilerActivity, profile

from blt_train.config import LoggingConfig
from blt_train.errors import ConfigError
from blt_train.files import naming
from blt_train.runtime import Runtime
from blt_train.trace_table import trace_table

log = logging.getLogger(__name__)

DIRECTORY_NAME = "profile"

#: Allocations and frees that a memory record holds; the oldest are dropped beyond.
_MEMORY_EVENTS = 1_000_000


def check_profiling(config: LoggingConfig, device: torch.device) -> None:
    """Check that what a config asks for can be recorded on a device.

    Args:
        config: what is asked for.
        device: of the model.

    Raises:
        ConfigError: a record of CUDA memory on a CPU.
    """
    if config.memory_snapshot and device.type != "cuda":
        raise ConfigError(
            "logging.memory_snapshot records CUDA allocations, and this run is on the CPU: set "
            "logging.memory_snapshot=false, or run it on a GPU"
        )


class StepProfiler:
    """Traces the steps that a config names; a context manager around the loop, told of each step's begin and end."""

    def __init__(self, config: LoggingConfig, run: Path, runtime: Runtime) -> None:
        """Prepare; nothing is recorded yet.

        Args:
            config: which steps; checked by `check_profiling`.
            run: the run directory.
            runtime: this process's place.
        """
        first = config.profile_step
        self._steps = range(0) if first is None else range(first, first + config.profile_steps)
        self._records_memory = config.memory_snapshot
        self._directory = run / DIRECTORY_NAME
        self._runtime = runtime
        self._profile: profile | None = None
        self._first = self._last = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that ends, or runs out of memory, among the traced steps has these to show.
        self._finish()

    def begin(self, step: int) -> None:
        """Tell that a step begins; the first one to be traced starts the recording.

        Args:
            step: its number, from 1.
        """
        if step not in self._steps or self._profile is not None:
            return
        activities = [ProfilerActivity.CPU]
        if self._runtime.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        if self._records_memory:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True, with_stack=False)
        self._profile.start()
        self._first = self._last = step

    def end(self, step: int) -> None:
        """Tell that a step has ended; the last one to be traced has the files written.

        Args:
            step: its number, from 1.
        """
        if self._profile is None:
            return
        self._last = step
        if step == self._steps[-1]:
            self._finish()

    def _finish(self) -> None:
        """End the recording and write the files; a full disk is no reason to end training."""
        recording, self._profile = self._profile, None
        if recording is None:
            return
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        recording.stop()
        name = f"steps-{self._first:08d}-{self._last:08d}-rank-{self._runtime.rank:05d}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._write_trace(recording, self._directory / f"{name}.json.gz")
            if self._records_memory:
                self._write_memory(self._directory / f"{name}-memory.pickle")
        except OSError as error:
            log.warning("the profile was not written (%s); training goes on", error)

    def _write_trace(self, recording: profile, path: Path) -> None:
        plain = path.with_name(f".{path.name.removesuffix('.gz')}")
        packed = path.with_name(f".{path.name}")
        recording.export_chrome_trace(str(plain))
        if self._runtime.is_main:
            self._write_table(plain, path.with_name(f"steps-{self._first:08d}-{self._last:08d}.txt"))
        with naming(packed), plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        packed.replace(path)
        log.info("profile: %s", path)

    def _write_table(self, trace: Path, path: Path) -> None:
        table = trace_table(json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"])
        with naming(path):
            path.write_text(table, encoding="utf-8")
        click.echo(f"what took the most time in steps {self._first} to {self._last}:\n{table}", err=True)

    def _write_memory(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}")
        with naming(temporary):
            torch.cuda.memory._dump_snapshot(str(temporary))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.cuda.memory._record_memory_history(enabled=None)
        temporary.replace(path)
        log.info("memory snapshot for pytorch.org/memory_viz: %s", path)
