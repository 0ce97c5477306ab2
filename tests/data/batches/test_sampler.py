"""The draw order: complete permutations, no state, any world size."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.data.batches.sampler import CYCLE, MixtureSampler, allocate_slots, draws_for, permute
from khaosz.errors import ConfigError

EDGES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025]


@pytest.mark.parametrize("n", EDGES)
def test_an_epoch_is_a_permutation(n: int) -> None:
    for epoch in (0, 1, 2):
        assert sorted(permute(i, n, 5, epoch) for i in range(n)) == list(range(n))


def order(n: int, seed: int, epoch: int = 0) -> list[int]:
    return [permute(i, n, seed, epoch) for i in range(n)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 600),
    seed=st.integers(-(2**40), 2**63),
    epoch=st.integers(0, 2**40),
)
def test_any_seed_and_epoch_give_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(order(n, seed, epoch)) == list(range(n))


def test_large_domains_stay_in_range_and_do_not_collide() -> None:
    n = 10**12 + 39
    out = {permute(i, n, 3, 7) for i in range(n - 5000, n)}
    assert min(out) >= 0 and max(out) < n and len(out) == 5000


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = {tuple(order(500, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_positions_are_uniform() -> None:
    """Chi-square of where an index lands, over 5,000 fixed seeds, in 50 bins of 20 positions."""
    n, seeds, bins = 1000, 5000, 50
    for index in (0, 1, 499, 999):
        landed = np.array([permute(index, n, seed, 0) for seed in range(seeds)])
        counts = np.bincount(landed * bins // n, minlength=bins)
        expected = seeds / bins
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        # 49 degrees of freedom: 85.4 is the 99.9 % point; the seeds are fixed, so it never flips.
        assert chi_square < 85.4, f"index {index}: {chi_square:.1f}"


def test_neighbours_do_not_stay_neighbours() -> None:
    out = np.concatenate([order(1000, seed) for seed in range(50)])
    # A uniform permutation has one pair (i, i+1) on average that stays adjacent in order; the sum
    # over 50 of them is Poisson(50) and 50 + 4 sigma = 79.
    assert int((np.diff(out) == 1).sum()) < 79


def test_every_order_of_three_is_reached() -> None:
    orders = Counter(tuple(permute(i, 3, seed, 0) for i in range(3)) for seed in range(3000))
    assert set(orders) == set(itertools.permutations(range(3)))
    # Expected 500 each with a standard deviation of 20; 5 sigma of room.
    assert all(400 < count < 600 for count in orders.values()), orders


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_step_without_overlap(world: int) -> None:
    for step, batch in itertools.product((0, 1, 17), (3, 6, 7)):
        drawn = [list(draws_for(step, batch, rank, world)) for rank in range(world)]
        assert sorted(itertools.chain(*drawn)) == list(range(step * batch, (step + 1) * batch))
        assert max(map(len, drawn)) - min(map(len, drawn)) <= 1


def test_one_source_is_visited_once_per_epoch_by_the_seed_itself() -> None:
    sampler = MixtureSampler([14], [3.0], seed=4)
    for epoch in range(3):
        draws = range(epoch * 14, epoch * 14 + 14)
        assert [sampler.draw(i) for i in draws] == [(0, i) for i in order(14, 4, epoch)]
        assert {sampler.epoch(i) for i in draws} == {epoch}


def test_weighted_sources_run_through_their_own_complete_epochs() -> None:
    sizes, weights = [7, 100, 33], [3.0, 1.0, 1.0]
    sampler = MixtureSampler(sizes, weights, seed=9)
    drawn: list[list[int]] = [[], [], []]
    epochs: list[list[int]] = [[], [], []]
    for i in range(5 * CYCLE):
        source, index = sampler.draw(i)
        drawn[source].append(index)
        epochs[source].append(sampler.epoch(i))
    for source, size in enumerate(sizes):
        full = len(drawn[source]) // size
        assert full >= 2
        passes = [drawn[source][e * size : (e + 1) * size] for e in range(full)]
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert passes[0] != passes[1]
        assert epochs[source] == [i // size for i in range(len(drawn[source]))]


def test_shares_hold_in_every_stretch() -> None:
    weights = [0.5, 0.3, 0.2]
    sampler = MixtureSampler([1000, 1000, 1000], weights, seed=1)
    for start, length in ((0, 100), (700, 1000), (5000, 64)):
        drawn = Counter(sampler.draw(i)[0] for i in range(start, start + length))
        for source, weight in enumerate(weights):
            # The slots stand evenly: a stretch misses its share by two draws at most, and by a
            # rounded slot per cycle.
            assert abs(drawn[source] - weight * length) <= 3, drawn


def test_slots_follow_the_largest_remainder() -> None:
    assert allocate_slots([1.0, 1.0, 1.0]) == [342, 341, 341]
    assert allocate_slots([1.0, 0.0]) == [1024, 0]
    small = allocate_slots([1.0, 1e-5])
    assert sum(small) == 1 << 17 and small[1] >= 1


def test_too_small_weight_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"1\.0e-09 of the sum") as caught:
        MixtureSampler([5, 5], [1.0, 1e-9], seed=0)
    assert caught.value.hint
