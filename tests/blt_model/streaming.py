"""Documents through windows of a fixed length, whatever computes them."""

from collections.abc import Callable

import numpy as np
import torch
from tests.blt_model.samples import Array
from torch import Tensor

from blt_model import StreamState

Step = Callable[[Tensor, Tensor, StreamState | None], tuple[Tensor, StreamState]]
"""Tokens, document offsets and state of a window to what it gives and the next state."""


def stream(step: Step, rows: list[Array], length: int, device: torch.device | str = "cpu") -> Tensor:
    """What `step` gives for framed documents end to end, in windows of `length` tokens."""
    tokens = torch.from_numpy(np.concatenate(rows)).to(device)
    ends = np.cumsum([len(row) for row in rows]).tolist()
    results: list[Tensor] = []
    state: StreamState | None = None
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        inner = [end - start for end in ends if start < end < stop]
        # The last document is empty.
        offsets = torch.tensor([0, *inner, stop - start, stop - start], dtype=torch.int32, device=device)
        part, state = step(tokens[start:stop], offsets, state)
        results.append(part)
        if stop in ends:
            state = None
    return torch.cat(results)
