"""Long series thinned to what a screen can show, in bounded memory, while a file is being read.

Rows are gathered in buckets of neighbours, of which mean, smallest and largest value are kept, so a spike of one step
is still seen. A bucket holds one row at first; whenever there are too many buckets, each two become one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

#: Buckets that a series has at most; charts are rarely wider in pixels.
MAX_POINTS = 800


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinnedSeries:
    """P points of several columns."""

    positions: Float64Array
    """float64 [P, X]: where each bucket ends on each of the horizontal axes."""

    means: Float64Array
    """float64 [P, C]: mean of each column's values in the bucket; nan where it has none."""

    lows: Float64Array
    """float64 [P, C]: the smallest."""

    highs: Float64Array
    """float64 [P, C]: the largest."""

    rows_per_point: int
    """Rows in a bucket; in the last one perhaps fewer."""


class Thinner:
    """Takes rows and keeps buckets of them."""

    def __init__(self, num_positions: int, num_columns: int, *, max_points: int = MAX_POINTS) -> None:
        """Make room.

        Args:
            num_positions: horizontal axes X.
            num_columns: columns C.
            max_points: buckets in the end, at most.
        """
        # Between halvings there are up to twice as many.
        room = 2 * max_points
        self._max_points = max_points
        self._rows_per_point = 1
        self._num_rows = 0
        self._positions = np.zeros((room, num_positions))
        self._sums = np.zeros((room, num_columns))
        self._counts = np.zeros((room, num_columns))
        self._lows = np.full((room, num_columns), np.nan)
        self._highs = np.full((room, num_columns), np.nan)

    def add(self, positions: Float64Array, values: Float64Array) -> None:
        """Add rows.

        Args:
            positions: float64 [n, X]: growing.
            values: float64 [n, C]: nan for a value that is missing.
        """
        numbers = np.arange(self._num_rows, self._num_rows + len(values))
        self._num_rows += len(values)
        while self._num_rows > 2 * self._max_points * self._rows_per_point:
            self._halve()
        buckets = numbers // self._rows_per_point
        self._positions[buckets] = positions  # of rows in one bucket the last one stays
        present = np.isfinite(values)
        np.add.at(self._sums, buckets, np.where(present, values, 0.0))
        np.add.at(self._counts, buckets, present)
        np.fmin.at(self._lows, buckets, np.where(present, values, np.nan))
        np.fmax.at(self._highs, buckets, np.where(present, values, np.nan))

    def _halve(self) -> None:
        """Join each two buckets."""
        half = self._max_points
        self._rows_per_point *= 2
        # Where the last pair has one bucket only, that one's position counts.
        second = self._positions[1::2]
        is_used = (second != 0).any(axis=1, keepdims=True)
        self._positions[:half] = np.where(is_used, second, self._positions[::2])
        for kept, join in ((self._sums, np.add), (self._counts, np.add), (self._lows, np.fmin), (self._highs, np.fmax)):
            kept[:half] = join(kept[::2], kept[1::2])
        for kept, empty in (
            (self._positions, 0.0), (self._sums, 0.0), (self._counts, 0.0), (self._lows, np.nan), (self._highs, np.nan)
        ):  # fmt: skip
            kept[half:] = empty

    def result(self) -> ThinnedSeries:
        """Return the buckets so far."""
        while self._num_rows > self._max_points * self._rows_per_point:
            self._halve()
        used = -(-self._num_rows // self._rows_per_point)
        counts = self._counts[:used]
        means = np.divide(self._sums[:used], counts, out=np.full_like(counts, np.nan), where=counts > 0)
        return ThinnedSeries(
            positions=self._positions[:used].copy(),
            means=means,
            lows=self._lows[:used].copy(),
            highs=self._highs[:used].copy(),
            rows_per_point=self._rows_per_point,
        )
