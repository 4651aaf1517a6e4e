"""Reading and writing weights."""

from blt_model.weights.native import load_model, model_fingerprint, save_model

__all__ = ["load_model", "model_fingerprint", "save_model"]
