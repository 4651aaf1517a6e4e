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


def kernels_of(function: Callable[[], object], device: torch.device, *, of: int = 1) -> list[dict[str, Any]]:
    """Every kernel of a call, the longest together first; empty off CUDA.

    Args:
        function: to call, once; whatever it needs to warm up is done.
        device: on which it works.
        of: how many times it does the same; figures are for one.

    Returns:
        Names, how often each ran, microseconds together, and the microseconds between the end of all that was begun
        before it and its own begin; the last row is that sum for all, and the span from the first to the last.
    """
    if device.type != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        wait(device)
    events = sorted((e for e in profile.events() or () if _is_kernel(e)), key=lambda event: event.time_range.start)
    if not events:
        return []
    rows: dict[str, dict[str, Any]] = {}
    end = events[0].time_range.start
    for event in events:
        row = rows.setdefault(event.name, {"kernel": event.name[:60], "runs": 0.0, "us": 0.0, "idle_before_us": 0.0})
        row["runs"] += 1 / of
        row["us"] += event.device_time_total / of
        row["idle_before_us"] += max(0.0, event.time_range.start - end) / of
        end = max(end, event.time_range.end)
    found = sorted(rows.values(), key=lambda row: -row["us"])
    idle = sum(row["idle_before_us"] for row in found)
    span = (end - events[0].time_range.start) / of
    return [*found, {"kernel": "from first to last", "us": span, "idle_before_us": idle}]


def _is_kernel(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA" and not event.name.startswith("ProfilerStep"))
