"""CUDA graphs of steps with fixed shapes: one launch for all the small operations of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


def bucket(count: int, most: int) -> int:
    """The next power of two, at most `most`: so many shapes are captured, and no more."""
    return min(most, 1 << max(count - 1, 0).bit_length())


class GraphRunner:
    """Runs functions of fixed shapes: captured once and replayed on CUDA, called elsewhere."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        """Begin without graphs.

        Args:
            device: of all tensors.
            enabled: capture graphs; only where the device is CUDA.
        """
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, tuple[Any, Any]] = {}
        self._pool: Any = None

    def clear(self) -> None:
        """Forget all graphs, because a buffer that they use was replaced."""
        self._graphs.clear()

    def run(self, key: Hashable, function: Callable[[], _Result], changed: Sequence[Tensor] = ()) -> _Result:
        """Run a function.

        Args:
            key: what the shapes of the function depend on.
            function: reads and writes tensors that stay where they are from call to call, and waits for nothing.
            changed: tensors that it changes otherwise on a second call than on the first.

        Returns:
            What the function returned when it was captured; the tensors in it hold this call's results until the next.
        """
        if not self.enabled:
            return function()
        if key not in self._graphs:
            self._graphs[key] = self._capture(function, changed)
        graph, result = self._graphs[key]
        graph.replay()
        kept: _Result = result
        return kept

    def _capture(self, function: Callable[[], _Result], changed: Sequence[Tensor]) -> tuple[Any, _Result]:
        """Capture after a trial, which lets libraries allocate what they need."""
        before = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        return graph, result
