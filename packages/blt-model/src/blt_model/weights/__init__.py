"""Reading and writing weights."""

from blt_model.weights.loading import LoadedModel, WeightFormat, load
from blt_model.weights.native import load_model, model_fingerprint, save_model
from blt_model.weights.transformers_files import save_transformers

__all__ = [
    "LoadedModel",
    "WeightFormat",
    "load",
    "load_model",
    "model_fingerprint",
    "save_model",
    "save_transformers",
]
