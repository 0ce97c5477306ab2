"""Agreement of annotators who rank the same answers.

Krippendorff's alpha with the ordinal metric (Krippendorff, "Computing Krippendorff's
Alpha-Reliability", 2011, https://repository.upenn.edu/asc_papers/43). A unit is one answer, its
value the rank that an annotator gives it. The ordinal metric depends on the order of values alone,
so ranks are scaled to 0 (best) ... 1 (worst): alpha stays the same where all rankings have equally
many answers, and the last of 3 is comparable with the last of 5 where they have not. Tied answers
share the mean of their ranks.

Shapes: I items (a prompt with its answers), V distinct values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

DRAWS = 1000  # of a bootstrap


def scaled_ranks(levels: Sequence[Sequence[int]]) -> list[Fraction]:
    """The scaled rank of each answer; `levels` has their indices, best first, ties together."""
    count = sum(map(len, levels))
    ranks, above = [Fraction(0)] * count, 0
    for level in levels:
        for answer in level:
            ranks[answer] = (above + Fraction(len(level) - 1, 2)) / max(count - 1, 1)
        above += len(level)
    return ranks


def coincidences(items: Sequence[Sequence[Sequence[Fraction]]]) -> np.ndarray:
    """Matrices of coincidences, float64 (I, V, V). An item has a row of values per annotator; a
    unit is a column. A unit of m values adds 1 / (m - 1) per ordered pair of them."""
    values = {
        v: i for i, v in enumerate(sorted({v for item in items for row in item for v in row}))
    }
    matrices = np.zeros((len(items), len(values), len(values)))
    for matrix, item in zip(matrices, items, strict=True):
        for unit in zip(*item, strict=True):
            if len(unit) > 1:
                counts = np.bincount([values[v] for v in unit], minlength=len(values))
                matrix += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    return matrices


def ordinal_alpha(matrix: np.ndarray) -> float | None:
    """Alpha of one matrix of coincidences (V, V): 1 - observed / expected disagreement. None where
    it is not defined: no unit has two values, or all values are the same.

    The ordinal distance of two values is the count of pooled values between them, half of each of
    their own included: the difference of their positions in the pooled order.
    """
    counts = matrix.sum(0)
    total = counts.sum()
    positions = np.cumsum(counts) - counts / 2
    distances = np.subtract.outer(positions, positions) ** 2
    expected = (np.outer(counts, counts) * distances).sum()
    if not expected:
        return None
    return float(1 - (total - 1) * (matrix * distances).sum() / expected)


def bootstrap(
    size: int, statistic: Callable[[np.ndarray], float | None], *, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % interval of a statistic, by drawing items with replacement. `statistic` gets how
    often each item was drawn, (I,). Whole items are drawn, since ranks within an item depend on
    each other. None for fewer than two items, and where over half of the draws have no value."""
    if size < 2:
        return None
    generator = np.random.default_rng(seed)
    draws = [
        statistic(generator.multinomial(size, [1 / size] * size).astype(float))
        for _ in range(DRAWS)
    ]
    values = [value for value in draws if value is not None]
    if len(values) * 2 < DRAWS:
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def bradley_terry(wins: np.ndarray) -> list[float] | None:
    """Log-strengths of M models, mean 0, by maximum likelihood: model a beats b with probability
    sigma(a - b). `wins` (M, M): how often the row beats the column, a tie counts half for both.

    Minorization-maximization (Hunter 2004, doi:10.1214/aos/1079120141). None where the maximum does
    not exist: some models never lost to, or were never compared with, the others (section 2).
    """
    count = len(wins)
    reached = np.linalg.matrix_power((wins > 0) + np.eye(count), count) > 0
    if count < 2 or not reached.all():
        return None
    games, strengths = wins + wins.T, np.ones(count)
    for _ in range(100_000):
        before = strengths
        strengths = wins.sum(1) / (games / np.add.outer(before, before)).sum(1)
        strengths /= np.exp(np.log(strengths).mean())
        if np.abs(np.log(strengths / before)).max() < 1e-12:
            break
    return [float(score) for score in np.log(strengths)]
