"""Training, evaluation and generation for the Byte Latent Transformer.

The names below are imported on first use: torch takes seconds to load, which `blt-train --help` need not wait for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from blt_data.openmp import spin_less

if TYPE_CHECKING:
    from blt_train.config import (
        BatchConfig,
        CheckpointConfig,
        DataConfig,
        EvaluationConfig,
        LoggingConfig,
        ModelConfig,
        OptimizerConfig,
        Precision,
        ScheduleConfig,
        TrainConfig,
    )
    from blt_train.config_files import packaged_configs
    from blt_train.config_parsing import config_from_mapping, load_config
    from blt_train.errors import CheckpointError, ConfigError, TrainingError
    from blt_train.evaluation import Evaluation, evaluate
    from blt_train.generation import generate
    from blt_train.metrics import EvaluationMetrics, StepMetrics, read_metrics
    from blt_train.trainer import TrainResult, train

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "Evaluation",
    "EvaluationConfig",
    "EvaluationMetrics",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "ScheduleConfig",
    "StepMetrics",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "config_from_mapping",
    "evaluate",
    "generate",
    "load_config",
    "packaged_configs",
    "read_metrics",
    "train",
]

_HOMES = {
    "config": (
        "BatchConfig",
        "CheckpointConfig",
        "DataConfig",
        "EvaluationConfig",
        "LoggingConfig",
        "ModelConfig",
        "OptimizerConfig",
        "Precision",
        "ScheduleConfig",
        "TrainConfig",
    ),
    "config_files": ("packaged_configs",),
    "config_parsing": ("config_from_mapping", "load_config"),
    "errors": ("CheckpointError", "ConfigError", "TrainingError"),
    "evaluation": ("Evaluation", "evaluate"),
    "generation": ("generate",),
    "metrics": ("EvaluationMetrics", "StepMetrics", "read_metrics"),
    "trainer": ("TrainResult", "train"),
}

spin_less()  # torch reads this when it is loaded, which every way into this package does later


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
