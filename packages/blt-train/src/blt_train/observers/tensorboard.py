"""TensorBoard event files, in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from blt_train.observers.protocol import Record, scalars_of
from blt_train.samples import Sample

DIRECTORY_NAME = "tensorboard"


class TensorBoardObserver:
    """Writes scalars, samples and the config as TensorBoard shows them."""

    def __init__(self, run: Path, config: Mapping[str, Any], *, first_step: int) -> None:
        """Open a new event file beside those of earlier launches.

        Args:
            run: the run directory.
            config: of the run, as nested plain values.
            first_step: the step that training goes on with, from 1; what an interrupted launch told of it and later
                ones is marked as void, which TensorBoard then does not show.
        """
        from torch.utils.tensorboard import SummaryWriter

        # Before its first checkpoint a run begins anew, at the evaluation of step 0.
        purge_step = first_step if first_step > 1 else 0
        self._writer: Any = SummaryWriter(str(run / DIRECTORY_NAME), purge_step=purge_step)
        self._writer.add_text("config", _code(yaml.safe_dump(dict(config), sort_keys=False)), first_step - 1)

    def observe(self, record: Record) -> None:
        """Write one record."""
        if isinstance(record, Sample):
            self._writer.add_text(f"sample/{record.index}", _code(record.prompt + record.completion), record.step)
            return
        for name, value in scalars_of(record).items():
            self._writer.add_scalar(name, value, record.step)

    def flush(self) -> None:
        """Write what is in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _code(text: str) -> str:
    """Return text as an indented block of Markdown, which TensorBoard shows as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
