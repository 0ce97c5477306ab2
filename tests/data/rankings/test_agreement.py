"""Agreement against published examples and independent arithmetic in float64."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from khaosz.data.rankings.agreement import (
    bootstrap,
    bradley_terry,
    coincidences,
    ordinal_alpha,
    scaled_ranks,
)

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: four observers, twelve
# units, missing values. Rows are units here, without the missing ones.
PUBLISHED = (
    "111", "2223", "3333", "3333", "2222", "1234", "4444", "1112", "2222", "555", "11", "3"
)  # fmt: skip


def alpha(units: list[list[float]]) -> float | None:
    """Of units with any values: each an item of its own, with one answer."""
    items = [[[Fraction(value)] for value in unit] for unit in units]
    return ordinal_alpha(coincidences(items).sum(0))


def reference(units: list[list[float]]) -> float:
    """By the definition: disagreement summed over pairs of values, ordinal distances by counting
    values one by one."""
    units = [unit for unit in units if len(unit) > 1]
    pooled = sorted(value for unit in units for value in unit)

    def distance(a: float, b: float) -> float:
        low, high = min(a, b), max(a, b)
        between = sum(low <= value <= high for value in pooled)
        return float(between - (pooled.count(a) + pooled.count(b)) / 2) ** 2

    observed = sum(
        distance(a, b) / (len(unit) - 1) for unit in units for a, b in permutations(unit, 2)
    )
    expected = sum(distance(a, b) for a, b in permutations(pooled, 2))
    return 1 - (len(pooled) - 1) * observed / expected


def test_published_example() -> None:
    units = [[float(digit) for digit in unit] for unit in PUBLISHED]
    assert sum(map(len, units)) == 41
    assert round(alpha(units) or 0, 3) == 0.815


def test_random_rankings_equal_the_definition() -> None:
    draw = random.Random(0)
    for _ in range(20):
        items, units = [], []
        for _ in range(6):
            answers, people = draw.randint(2, 5), draw.randint(1, 4)
            rows = []
            for _ in range(people):
                ranks = [draw.randint(0, 3) for _ in range(answers)]
                rows.append(
                    scaled_ranks([[i for i in range(answers) if ranks[i] == r] for r in range(4)])
                )
            items.append(rows)
            units += [[float(value) for value in unit] for unit in zip(*rows, strict=True)]
        shared = ordinal_alpha(coincidences(items).sum(0))
        assert shared == pytest.approx(reference(units), abs=1e-12)


def test_perfect_opposite_and_undefined_agreement() -> None:
    up, down = scaled_ranks([[0], [1], [2]]), scaled_ranks([[2], [1], [0]])
    assert scaled_ranks([[1], [0, 2]]) == [Fraction(3, 4), 0, Fraction(3, 4)]
    assert ordinal_alpha(coincidences([[up, up]]).sum(0)) == 1
    opposite = ordinal_alpha(coincidences([[up, down]]).sum(0))
    assert opposite is not None and opposite < -0.5
    tied = scaled_ranks([[0, 1, 2]])
    assert ordinal_alpha(coincidences([[tied, tied]]).sum(0)) is None
    assert ordinal_alpha(coincidences([[up]]).sum(0)) is None


def test_interval_is_the_bootstrap_of_whole_items() -> None:
    values = np.array([0.0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    interval = bootstrap(10, lambda drawn: float(drawn @ values / 10))
    # Quantiles of a binomial of 10 at 0.6: P(X <= 2) = 0.012, P(X <= 3) = 0.055, P(10) = 0.006.
    assert interval == pytest.approx((0.3, 0.9))
    assert bootstrap(1, lambda drawn: 1.0) is None
    assert bootstrap(10, lambda drawn: None) is None


def test_bradley_terry_maximizes_the_likelihood() -> None:
    wins = np.array([[0, 7, 3.5], [2, 0, 4], [1.5, 5, 0]])
    scores = bradley_terry(wins)
    assert scores is not None and sum(scores) == pytest.approx(0, abs=1e-9)
    for a in range(3):  # where the gradient is zero: wins are as many as expected
        expected = sum(
            (wins[a, b] + wins[b, a]) / (1 + np.exp(scores[b] - scores[a]))
            for b in range(3)
            if b != a
        )
        assert expected == pytest.approx(wins[a].sum(), abs=1e-8)
    assert bradley_terry(np.array([[0.0, 3], [0, 0]])) is None  # never lost
    assert bradley_terry(np.array([[0.0]])) is None
