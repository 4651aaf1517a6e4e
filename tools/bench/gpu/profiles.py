"""Where the time of a call on the GPU goes: kernels by kind, and idle time between them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from tools.bench.gpu.harness import wait

KINDS = (
    ("attention", ("flash", "fmha", "flex_attention", "_attend", "attention")),
    ("linear", ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk", "_linear", "_scaled_mm")),
    (
        "hash embeddings",
        (
            "embedding_bag",
            "embeddingbag",
            "embedding_backward",
            "compute_grad_weight",
            "radixsort",
            "sum_and_scatter",
            "segment_offsets",
        ),
    ),
    (
        "segments",
        ("segment_reduce", "scatter", "gather", "index", "bytes_read", "patches_read", "_join", "_pool", "_spread"),
    ),
    ("optimizer", ("adam", "multi_tensor", "foreach", "lpnorm")),
    ("copies", ("memcpy", "memset", "copy_kernel", "direct_copy")),
    ("fused elementwise", ("triton_",)),
    ("elementwise", ("elementwise", "reduce_kernel", "layer_norm", "rms_norm", "softmax", "cunn")),
)
"""Kinds of kernels by parts of their names; the first that fits is taken."""


def kind_of(kernel: str) -> str:
    """The kind of a kernel."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")


def time_by_kind(function: Callable[[], object], device: torch.device, *, top: int = 0) -> dict[str, float]:
    """Milliseconds of one call by kind of kernel; empty off CUDA.

    Args:
        function: to call, twice: once to warm up.
        device: on which it works.
        top: also print so many of the kernels that take longest.

    Returns:
        Kinds, longest first, and "idle": wall-clock time in which no kernel ran.
    """
    if device.type != "cuda":
        return {}
    function()
    wait(device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        function()
        wait(device)
        wall = time.perf_counter() - started
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profile.events() or ():
        if _is_kernel(event):
            kernels[event.name] += event.device_time_total
            calls[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, microseconds in kernels.items():
        kinds[kind_of(name)] += microseconds
    for name, microseconds in kernels.most_common(top):
        print(f"{microseconds / 1e3:9.3f} ms {calls[name]:6} x  {kind_of(name):18} {name[:110]}")
    result = {kind: microseconds / 1e3 for kind, microseconds in kinds.most_common()}
    return {**result, "idle": max(0.0, 1e3 * wall - sum(result.values()))}


def _is_kernel(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA" and not event.name.startswith("ProfilerStep"))
