"""Interleaving: fixed shares at every point, each source's sequences in order, a pure function of weights and seed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blt_train.mixture import Interleaving

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(0, 2**63 - 1), st.integers(0, 2**45))
def test_counts_and_places_agree_anywhere(weights: list[float], seed: int, first: int) -> None:
    interleaving = Interleaving(weights, seed=seed)
    counts = interleaving.counts(first)
    assert sum(counts) == first
    for index in range(first, first + 50):
        source, number = interleaving.place(index)
        assert number == counts[source]
        counts[source] += 1
        assert interleaving.counts(index + 1) == counts


@given(WEIGHTS, st.integers(0, 2**63 - 1), st.integers(0, 10**12))
def test_shares_hold_at_every_length(weights: list[float], seed: int, number: int) -> None:
    for weight, count in zip(weights, Interleaving(weights, seed=seed).counts(number), strict=True):
        # The counts are exact to a few sequences; the last term is the rounding of the expected value itself.
        assert abs(count - number * weight / sum(weights)) <= len(weights) + number * 1e-14


def test_the_order_is_even_and_depends_on_the_seed() -> None:
    orders = [[Interleaving([3, 1], seed=seed).place(index)[0] for index in range(40)] for seed in range(8)]
    for order in orders:
        # Of any four neighbours exactly one is of the second source.
        assert all(sum(order[start : start + 4]) == 1 for start in range(37))
    assert len({tuple(order) for order in orders}) > 1
    # Written down: a resumed run must see the same order with any version.
    assert (
        "".join(str(Interleaving([2, 5, 3], seed=7).place(index)[0]) for index in range(20)) == "12101211021210121102"
    )
