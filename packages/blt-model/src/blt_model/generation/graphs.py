"""CUDA graphs of steps with fixed shapes: one launch for all the small operations of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def bucket(count: int, most: int) -> int:
    """The next power of two, at most `most`: so many shapes are captured, and no more."""
    return min(most, 1 << max(count - 1, 0).bit_length())


class Fork:
    """Lets two lines of work on a GPU run beside one another; off CUDA things happen in their order."""

    def __init__(self, device: torch.device) -> None:
        """Begin the second line: after all that was started so far, and nothing that is started later."""
        self._lines: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch gives it no types
            self._lines = torch.cuda.current_stream(device), side
            side.wait_stream(self._lines[0])

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Start the block's work on the second line; nothing that it allocates may be used outside it."""
        with nullcontext() if self._lines is None else torch.cuda.stream(self._lines[1]):
            yield

    def join(self) -> None:
        """Let later work on the first line wait for the second's, as it must before using what that wrote."""
        if self._lines is not None:
            self._lines[0].wait_stream(self._lines[1])


class GraphRunner:
    """Runs functions of fixed shapes: captured once and replayed on CUDA, called elsewhere."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        """Begin without graphs.

        Args:
            device: of all tensors.
            enabled: capture graphs; only where the device is CUDA.
        """
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None

    def clear(self) -> None:
        """Forget all graphs, because a buffer that they use was replaced."""
        self._graphs.clear()
        # The pool goes with the last of its graphs.
        self._pool = None

    def has(self, key: Hashable) -> bool:
        """Whether a function was captured, so that running it waits for nothing."""
        return key in self._graphs

    def run(self, key: Hashable, function: Callable[[], None], changed: Sequence[Tensor] = ()) -> None:
        """Run a function.

        All graphs share the memory of what they compute on the way, so nothing of that outlives a run: what a function
        gives to the next it copies to a tensor that was there before.

        Args:
            key: what the shapes of the function depend on.
            function: reads and writes tensors that stay where they are from call to call, and waits for nothing.
            changed: tensors that it changes otherwise on a second call than on the first, and those of the host that
                are looked at for what it writes, where a trial's would be taken for its own.
        """
        if not self.enabled:
            function()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(function, changed)
        self._graphs[key].replay()

    def _capture(self, function: Callable[[], None], changed: Sequence[Tensor]) -> Any:
        """Capture after a trial, which lets libraries allocate what they need."""
        # Tensors of the host are kept as they are after all that was started, and put back before anything else is.
        torch.cuda.current_stream().synchronize()
        before = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        stream.synchronize()
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph
