"""How far training is, on standard error: a bar on a terminal, one line a minute in logs and pipes.

The lines come from a thread, so that a log also tells of a run that stands still: it compiles, or waits for data or for
another rank.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Self

import click

from blt_data.console import ProgressBar, format_bytes, format_duration, progress
from blt_data.progress import line_interval
from blt_train.metrics import EvaluationMetrics, Metrics, StepMetrics


class TrainingDisplay:
    """Shows a run's metrics as they come; a context manager, to be called with each of them."""

    def __init__(self, description: str, total_steps: int) -> None:
        """Prepare; nothing is shown yet.

        Args:
            description: what is being done, such as `training runs/mine`.
            total_steps: of the run.
        """
        self._description, self._total = description, total_steps
        self._lock = threading.Lock()
        self._window = _Window(time.monotonic())
        self._last: StepMetrics | None = None
        self._last_at = time.monotonic()
        self._holdout: EvaluationMetrics | None = None
        self._bar: ProgressBar | None = None
        self._bar_context = progress(description, total_steps, "steps") if sys.stderr.isatty() else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True)
        self._has_news = False

    def __enter__(self) -> Self:
        if self._bar_context is not None:
            self._bar = self._bar_context.__enter__()
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar_context is not None:
            self._bar_context.__exit__(kind, error, trace)
            return
        self._stop.set()
        self._thread.join()
        if self._has_news:
            self._write()

    def __call__(self, metrics: Metrics) -> None:
        """Take the metrics of a step or an evaluation."""
        with self._lock:
            self._has_news = True
            if isinstance(metrics, EvaluationMetrics):
                self._holdout = metrics
                return
            before = self._last.step if self._last is not None else 0
            self._last, self._last_at = metrics, time.monotonic()
            self._window.add(metrics)
        if self._bar is not None:
            held_out = f" (held out {self._holdout.holdout_bpb:.3f})" if self._holdout is not None else ""
            speed = f"{format_bytes(metrics.bytes_per_second)}/s"
            wait = f", data wait {_share(metrics.data_wait, metrics.seconds)}" if _waits(metrics) else ""
            skipped = f", {tell_skipped(metrics.nonfinite_steps)}" if metrics.nonfinite_steps else ""
            self._bar.advance(metrics.step - before, f"{metrics.bpb:.3f} bits/byte{held_out}, {speed}{wait}{skipped}")

    def status(self) -> str:
        """Return the state as one line, with speeds since the line before, and begin the next window."""
        with self._lock:
            window, self._window = self._window, _Window(time.monotonic())
            last, holdout = self._last, self._holdout
            self._has_news = False
        elapsed = time.monotonic() - window.started
        if last is None:
            before = f"held out {holdout.holdout_bpb:.4f} bits/byte, " if holdout is not None else ""
            return f"{before}no step yet"
        pieces = [
            f"step {last.step:,}/{self._total:,} ({100 * last.step // self._total}%)",
            f"loss {last.loss:.4f}",
            f"{last.bpb:.4f} bits/byte",
            f"held out {holdout.holdout_bpb:.4f} at step {holdout.step:,}" if holdout is not None else "",
            tell_skipped(last.nonfinite_steps),
        ]
        if window.steps:
            left = (self._total - last.step) * elapsed / window.steps
            pieces += [
                f"{format_bytes(window.bytes / elapsed)}/s",
                f"data wait {_share(window.data_wait, window.seconds)}",
                f"MFU {100 * last.mfu:.1f}%" if last.mfu is not None else "",
                f"{format_duration(left)} left",
            ]
        else:
            pieces.append(f"no step for {format_duration(time.monotonic() - self._last_at)}")
        return ", ".join(piece for piece in pieces if piece)

    def _heartbeat(self) -> None:
        interval = line_interval()
        while not self._stop.wait(interval):
            self._write()

    def _write(self) -> None:
        click.echo(f"{self._description}: {self.status()}", err=True)


class _Window:
    """Sums over the steps since some instant."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.steps = 0
        self.bytes = 0
        self.seconds = 0.0
        self.data_wait = 0.0

    def add(self, metrics: StepMetrics) -> None:
        self.steps += 1
        self.bytes += metrics.bytes
        self.seconds += metrics.seconds
        self.data_wait += metrics.data_wait


def tell_skipped(steps: int) -> str:
    """Return how many steps were left out, in words; nothing for none."""
    return f"{steps:,} step{'' if steps == 1 else 's'} skipped as not finite" if steps else ""


def _share(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1e-9):.0f}%"


def _waits(metrics: StepMetrics) -> bool:
    """Return whether waiting for data is worth a word: it takes more than a twentieth of the time."""
    return metrics.data_wait > 0.05 * metrics.seconds
