"""Which source each sequence of a mixture is from: fixed shares, evenly interleaved, without any state.

Sources are split off one after the other: of n sequences, the first source gets floor(n * its share + phase), and the
rest goes to the others in the same way. Such counts grow by single steps with n, so "how many sequences of each source
are among the first n" is a formula, and so is the source of any sequence. At every n the counts are within a few
sequences of exact shares, however large n is.
"""

from __future__ import annotations

from collections.abc import Sequence

from blt_train.shuffling import random_integer

#: Shares are whole numbers of 2**-64; Python's integers make all sums exact.
_BITS = 64
#: Sets the phases apart from other random numbers that depend on the seed.
_PHASE_KEY = 0x6D69787475726573


class Interleaving:
    """The order of the sources in a mixture: a pure function of weights and seed."""

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Prepare the shares.

        Args:
            weights: above 0, one per source; only their ratios matter.
            seed: of the phases, that is where in its cycle each source begins.
        """
        self._shares = [
            min(round(weight / sum(weights[index:]) * 2**_BITS), 2**_BITS) for index, weight in enumerate(weights)
        ]
        self._phases = [random_integer(seed, _PHASE_KEY, index) for index in range(len(weights))]

    def counts(self, number: int) -> list[int]:
        """Return how many of the first `number` sequences are from each source.

        Args:
            number: at least 0.
        """
        counts = []
        rest = number
        for share, phase in zip(self._shares[:-1], self._phases, strict=False):
            counts.append((rest * share + phase) >> _BITS)
            rest -= counts[-1]
        return [*counts, rest]

    def place(self, index: int) -> tuple[int, int]:
        """Return (source, number of the sequence among those of its source) of a sequence, both from 0.

        Args:
            index: number of the sequence in the mixture, from 0.
        """
        rest = index
        for source, (share, phase) in enumerate(zip(self._shares[:-1], self._phases, strict=False)):
            before = (rest * share + phase) >> _BITS
            if ((rest + 1) * share + phase) >> _BITS > before:
                return source, before
            rest -= before
        return len(self._shares) - 1, rest
