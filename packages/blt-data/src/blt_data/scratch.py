"""Memory that is used again and again: to touch fresh memory costs more than to copy into what is there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Scratch:
    """One piece of memory, for one user at a time."""

    def __init__(self) -> None:
        self._data = np.empty(0, np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """Return uint8 [size], whose use ends that of what was returned before."""
        if size > len(self._data):
            # First let go of the old one, so that there are never two.
            self._data = np.empty(0, np.uint8)
            self._data = np.empty(size, np.uint8)
        return self._data[:size]
