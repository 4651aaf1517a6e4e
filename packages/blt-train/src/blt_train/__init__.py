"""Training, evaluation and generation for the Byte Latent Transformer."""

import blt_train.environment  # noqa: F401  # settings that torch reads when it is loaded, so it comes first

# isort: split
from blt_train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    ScheduleConfig,
    TrainConfig,
)
from blt_train.config_parsing import config_from_mapping, load_config, packaged_configs
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
