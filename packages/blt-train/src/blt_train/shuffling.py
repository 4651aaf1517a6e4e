"""Random orders that never change: written out here rather than taken from a library with versions of its own."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@numba.njit(cache=True, nogil=True)
def _mix(state: np.uint64) -> np.uint64:
    """Return splitmix64's output for a state."""
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _permutation(count: int, state: np.uint64) -> Int64Array:
    """Return int64 [count]: Fisher-Yates over splitmix64; the bias of the remainder is below count / 2**64."""
    order = np.arange(count)
    for index in range(count - 1, 0, -1):
        state = state + _GOLDEN
        other = int(_mix(state) % np.uint64(index + 1))
        order[index], order[other] = order[other], order[index]
    return order


def random_integer(*key: int) -> int:
    """Return a random integer of 0 to 2**64 - 1 that depends on the key alone.

    Args:
        key: any number of integers of 0 to 2**64 - 1, such as seed and epoch.
    """
    state = np.uint64(0)
    for part in key:
        state = np.uint64(_mix(np.uint64((int(state) + int(_GOLDEN)) % 2**64 ^ part)))
    return int(state)


def permutation(count: int, *key: int) -> Int64Array:
    """Return a random order that depends on the key alone.

    Args:
        count: number of items.
        key: any number of integers of 0 to 2**64 - 1, such as seed and epoch.

    Returns:
        int64 [count]: each of 0 to count - 1 once.
    """
    order: Int64Array = _permutation(count, np.uint64(random_integer(*key)))
    return order
