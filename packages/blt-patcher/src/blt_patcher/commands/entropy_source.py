"""Where a command's entropies come from: a scorer in this process, or scorers in the workers of an executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from blt_data.errors import InputError
from blt_data.executors import Executor, Report
from blt_patcher.commands.worker_options import WorkerOptions
from blt_patcher.precompute import Workers
from blt_patcher.scorers import Scorer, ScorerIdentity, ScorerSpec

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropySource:
    """A scorer, wherever it is."""

    scorer: Scorer | ScorerIdentity | None
    """The scorer, what is known of the workers' scorers, or None where no entropies are needed."""
    workers: Workers | None
    """Who patches; None where this process does."""
    load_here: Callable[[], Scorer] | None = None
    """Loads the workers' scorer in this process, where it can; a sample is scored here then, with all cores."""

    def call(self, function: Callable[..., R], *arguments: Any, on_progress: Report) -> R:
        """Return `function(scorer, report, *arguments)`, computed where the scorers are.

        Args:
            function: a function of a module; it may call its `report` to tell how far it is.
            arguments: picklable ones.
            on_progress: gets what is reported.

        Raises:
            InputError: the function raised one, or could not be run by the workers.
        """
        if self.workers is None or self.load_here is not None:
            scorer = self.scorer if self.load_here is None else self.load_here()
            return function(scorer, on_progress, *arguments)
        results: list[R] = []
        failures = self.workers.executor.run(
            partial(_prepare, function, self.workers.load_scorer),
            [arguments],
            names=["the sample"],
            on_progress=on_progress,
            on_result=lambda _, result: results.append(result),
        )
        if failures:
            raise InputError(str(failures[0]))
        return results[0]


def _prepare(
    function: Callable[..., R], load_scorer: Callable[[], Scorer] | None
) -> Callable[[tuple[Any, ...], Report], R]:
    scorer = load_scorer() if load_scorer is not None else None
    return lambda arguments, report: function(scorer, report, *arguments)


@contextmanager
def entropy_source(spec: ScorerSpec | None, placing: WorkerOptions) -> Iterator[EntropySource]:
    """Load a scorer, or make ready to have it loaded by workers, which end with the block.

    Args:
        spec: the model and how to run it; None where no entropies are needed.
        placing: where to patch.

    Yields:
        The source.

    Raises:
        InputError: the model, the device or the executor cannot be had.
    """
    device = placing.device(spec.device) if spec is not None else "cpu"
    executor: Executor | None = placing.start(device)
    if executor is None:
        yield EntropySource(scorer=spec.load() if spec is not None else None, workers=None)
        return
    if spec is None:
        with executor:
            yield EntropySource(scorer=None, workers=Workers(executor=executor, load_scorer=None))
        return
    # Each worker sees one GPU, or none.
    placed = dataclasses.replace(spec, device=device)
    with executor:
        workers = Workers(executor=executor, load_scorer=placed.load)
        load_here = placed.load if executor.on_one_machine else None
        yield EntropySource(scorer=placed.describe(device), workers=workers, load_here=load_here)
