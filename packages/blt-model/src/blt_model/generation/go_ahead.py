"""Speculative launches: steps launched before the host knows whether they are wanted, which wait for its word.

A launch takes the host longer than a decision. So a step is launched while the one before it still runs, and its first
kernel waits for the host's word: to go on, or to be skipped, upon which all kernels of the step end at once. The word
is written to the host's memory, where the device looks for it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

ROOM = 4
"""Launches whose words are kept at once; of those that may be under way each has its own."""


def launches_wait() -> bool:
    """Whether the host waits for all it launches, as the driver can be asked to: no launch may wait for it then."""
    return os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")


def flat_view(tensor: Tensor) -> Any:
    """The numbers of a tensor of the host as a flat memoryview, which is much quicker to read and write one by one.

    Type checkers take it to hold integers.
    """
    numbers: Any = tensor.numpy().ravel()
    return memoryview(numbers)


class GoAhead:
    """The words for launches, in their order, and a random number for each."""

    def __init__(self, device: torch.device) -> None:
        """Count launches from nought."""
        pinned = device.type == "cuda"
        self.state = torch.zeros(3, dtype=torch.int64, device=device)
        """int64 [3] on the device: launches that have had their word; whether the last was to be skipped; a place."""
        self.words = torch.zeros(ROOM, dtype=torch.int64, pin_memory=pinned)
        """int64 [ROOM] of the host: launch i, from nought, finds 2 (i + 1) at i modulo ROOM, or 1 more if unwanted."""
        self.uniforms = torch.zeros(ROOM, dtype=torch.float64, pin_memory=pinned)
        """float64 [ROOM] of the host, the random numbers of launches, at the same places."""
        self.uniform = torch.zeros(1, dtype=torch.float64, device=device)
        """float64 [1] on the device, that of the last launch which went on."""
        self._words_out, self._uniforms_out = flat_view(self.words), flat_view(self.uniforms)
        self._launches = 0

    @property
    def skipped(self) -> Tensor:
        """int64 [1] on the device, not nought while the present launch is to be skipped."""
        return self.state[1:2]

    @property
    def place(self) -> Tensor:
        """int64 [1] on the device, the place of the present launch, for kernels that run beside what counts it up."""
        return self.state[2:]

    def restart(self) -> None:
        """Let the device count on as the host does: a launch that failed has put them out of step."""
        self.state[:1].fill_(self._launches)

    def begin(self, uniform: float) -> None:
        """Count a launch, which is about to be made, with its random number."""
        self._uniforms_out[self._launches % ROOM] = uniform
        self._launches += 1

    def say(self, *, wanted: bool) -> None:
        """Give the last launch its word; once, and before the device is waited for."""
        self._words_out[(self._launches - 1) % ROOM] = 2 * self._launches + (not wanted)
