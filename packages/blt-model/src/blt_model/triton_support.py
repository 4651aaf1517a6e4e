"""Where our Triton kernels can run; loads nothing."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether triton is installed."""


def has_triton(tensor: Tensor) -> bool:
    """Whether a tensor is on CUDA, and triton is installed."""
    return tensor.device.type == "cuda" and HAS_TRITON


def takes_kernels(tensor: Tensor) -> bool:
    """Whether kernels that compute in float32 may take a tensor of numbers: as `has_triton`, and no wider."""
    return has_triton(tensor) and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
