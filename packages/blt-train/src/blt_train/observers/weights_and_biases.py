"""Weights & Biases, online or offline (`wandb sync RUN/wandb/offline-run-…` sends an offline run later).

A run keeps its id in RUN/wandb-run.json, so that a resumed run is the same run there, and beside it the last record
told, so that nothing is told twice: what a killed launch told of steps beyond its last checkpoint is what the resumed
one finds there, too, but for times.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blt_train.config import LoggingConfig, WandbMode
from blt_train.metrics import EvaluationMetrics
from blt_train.observers.protocol import Record, scalars_of
from blt_train.samples import Sample

STATE_NAME = "wandb-run.json"

#: Place of each kind of record within its step; sample i comes i places after the first.
_STEP, _EVALUATION, _SAMPLE = 0, 1, 2


class WandbObserver:
    """Logs scalars and samples of a run."""

    def __init__(self, run: Path, config: Mapping[str, Any], logging: LoggingConfig, *, first_step: int) -> None:
        """Open the run at Weights & Biases, or go on with it.

        Args:
            run: the run directory.
            config: of the run, as nested plain values.
            logging: mode and project are read.
            first_step: the step that training goes on with, from 1; a run that begins anew is a new one there, too.
        """
        import wandb

        self._wandb = wandb
        self._state = run / STATE_NAME
        if first_step == 1:
            self._state.unlink(missing_ok=True)
        identifier, self._told = _read_state(self._state)
        identifier = identifier or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=logging.wandb_project,
            dir=str(run),
            id=identifier,
            name=run.resolve().name,
            resume="allow" if logging.wandb is WandbMode.ONLINE else None,
            mode="online" if logging.wandb is WandbMode.ONLINE else "offline",
            config=dict(config),
            # It would take over standard output, and tell of itself there.
            settings=wandb.Settings(console="off", silent=True),
        )
        known = int(self._run.step) - 1
        if known > self._told[0]:  # the server knows more than a file that was lost, or copied with an older run
            self._told = (known, _SAMPLE)
        self._keep()

    def observe(self, record: Record) -> None:
        """Log one record, unless an earlier launch has."""
        if isinstance(record, Sample):
            place = (record.step, _SAMPLE + record.index)
            content: dict[str, Any] = {f"sample/{record.index}": self._html(record)}
        else:
            place = (record.step, _EVALUATION if isinstance(record, EvaluationMetrics) else _STEP)
            content = dict(scalars_of(record))
        if place <= self._told:
            return
        self._run.log(content, step=record.step)
        self._told = place
        self._keep()

    def flush(self) -> None:
        """Do nothing: what was logged is with another process already, which outlives this one."""

    def close(self) -> None:
        """Send or write what is left and end the run there."""
        self._run.finish()

    def _html(self, sample: Sample) -> Any:
        from markupsafe import escape

        return self._wandb.Html(f"<pre><b>{escape(sample.prompt)}</b>{escape(sample.completion)}</pre>")

    def _keep(self) -> None:
        """Write down what was told; readers of the file see the old or the new, and losing it only tells twice."""
        temporary = self._state.with_name(f".{STATE_NAME}.tmp")
        temporary.write_text(json.dumps({"id": self._run.id, "told": list(self._told)}), encoding="utf-8")
        temporary.replace(self._state)


def _read_state(path: Path) -> tuple[str | None, tuple[int, int]]:
    """Return the run's id and the place of the last record told; (None, before all) where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        step, kind = content["told"]
        return str(content["id"]), (int(step), int(kind))
    except (OSError, ValueError, KeyError, TypeError):
        return None, (-1, _SAMPLE)
