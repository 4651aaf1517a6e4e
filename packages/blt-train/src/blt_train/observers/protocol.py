"""What an observer is, and what it is told."""

from __future__ import annotations

import math
from typing import Protocol, TypeAlias

from blt_train.metrics import EvaluationMetrics, StepMetrics
from blt_train.samples import Sample

Record: TypeAlias = StepMetrics | EvaluationMetrics | Sample
"""What happens in a run, in the order of steps; after a step come its evaluation and samples, if any."""

#: Groups of a step's fields under which dashboards show them; what is not named stands under `train`.
_GROUPS = {
    "speed": (
        "seconds",
        "data_wait",
        "bytes_per_second",
        "patches_per_second",
        "bytes_per_second_per_rank",
        "patches_per_second_per_rank",
        "flops_per_second_per_rank",
        "mfu",
    ),
    "checkpoint": ("checkpoint_seconds", "checkpoint_bytes"),
    "memory": ("memory_bytes", "memory_reserved_bytes"),
    "data": ("targets", "bytes", "patches", "mean_patch_length", "utilisation", "epoch", "sources", "flops"),
}
_GROUP_OF = {field: group for group, fields in _GROUPS.items() for field in fields}


class Observer(Protocol):
    """Something that is told of a run; all calls come from one thread."""

    def observe(self, record: Record) -> None:
        """Take one record."""

    def flush(self) -> None:
        """Write what a killed process would lose: a checkpoint comes, after which none of it is told again."""

    def close(self) -> None:
        """Send or write what is left; nothing is told afterwards."""


def scalars_of(metrics: StepMetrics | EvaluationMetrics) -> dict[str, float]:
    """Return the numbers of a record by the names that dashboards show, such as `train/loss` and `holdout/bpb`.

    Args:
        metrics: a step's or an evaluation's; fields that are null are left out, those by source become one each.
    """
    is_evaluation = isinstance(metrics, EvaluationMetrics)
    scalars: dict[str, float] = {}
    for field in type(metrics).__dataclass_fields__:
        value = getattr(metrics, field)
        name = (
            "holdout/" + field.removeprefix("holdout_") if is_evaluation else f"{_GROUP_OF.get(field, 'train')}/{field}"
        )
        if field == "step" or value is None:
            continue
        if isinstance(value, (int, float)):
            if math.isfinite(value):  # a step that was left out has neither loss nor norm
                scalars[name] = float(value)
        else:
            scalars.update({f"{name}/{source}": float(part) for source, part in value.items()})
    return scalars
