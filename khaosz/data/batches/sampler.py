"""The order of training windows, as a pure function of the draw number.

Nothing is shuffled in memory or saved: the order of an epoch is a keyed permutation, computed one
index at a time, so a run resumes from its step number alone, at any world size.

The permutation is a balanced Feistel network (Luby and Rackoff 1988) over the next power of four,
restricted to [0, n) by cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). The domain is less than 4 n, so a walk takes fewer than 4 steps on average.
"""

from __future__ import annotations

from math import isfinite

import numpy as np

from khaosz.errors import ConfigError

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8  # 4 are enough for large halves; tiny domains (one-bit halves) need a few more

CYCLE = 1024
"""Slots of a mixture's schedule; doubled for a weight below 1/1024."""
_LARGEST_CYCLE = 1 << 20


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection on 64 bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _round_keys(seed: int, epoch: int) -> list[int]:
    key = _mix((seed + _GOLDEN) & _MASK)
    key = _mix((key + epoch * _GOLDEN + _GOLDEN) & _MASK)
    return [_mix((key + (i + 1) * _GOLDEN) & _MASK) for i in range(_ROUNDS)]


def permute(index: int, n: int, seed: int, epoch: int) -> int:
    """The image of `index` under the permutation of [0, n) of (seed, epoch)."""
    assert 0 <= index < n, f"index {index} outside [0, {n})"
    bits = ((n - 1).bit_length() + 1) // 2  # 4^bits is the smallest power of four >= n
    low = (1 << bits) - 1
    keys = _round_keys(seed, epoch)
    value = index
    while True:
        left, right = value >> bits, value & low
        for key in keys:
            left, right = right, left ^ (_mix((right + key) & _MASK) & low)
        value = (left << bits) | right
        if value < n:
            return value


def draws_for(step: int, global_batch: int, rank: int, world: int) -> range:
    """The draws of one rank in one step: every world-th of [step * G, (step + 1) * G)."""
    assert 0 <= rank < world, f"rank {rank} of {world}"
    return range(step * global_batch + rank, (step + 1) * global_batch, world)


def example_of(draw: int, total: int, seed: int) -> int:
    """The example of a draw, where every epoch visits all `total` examples in another order."""
    epoch, within = divmod(draw, total)
    return permute(within, total, seed, epoch)


def answer_seed(seed: int, number: int) -> int:
    """The seed of the `number`-th sampled answer of a run, from 0 to 2^63 - 1: distinct within the
    run, and unrelated to the answers of a run with another seed."""
    return (_mix((seed + _GOLDEN) & _MASK) + number) & (_MASK >> 1)


def allocate_slots(weights: list[float]) -> list[int]:
    """Whole slots of a cycle in proportion to `weights`, by the largest remainder.

    The cycle has `CYCLE` slots, doubled until the smallest positive weight gets one.

    Raises ConfigError for a weight below a millionth of the sum.
    """
    total = sum(weights)
    assert total > 0 and all(isfinite(w) and w >= 0 for w in weights), f"weights {weights}"
    smallest = min(weight for weight in weights if weight > 0) / total
    cycle = CYCLE
    while smallest * cycle < 1 and cycle < _LARGEST_CYCLE:
        cycle *= 2
    if smallest * cycle < 1:
        raise ConfigError(
            f"a mixing weight is {smallest:.1e} of the sum, less than one draw in {cycle}",
            hint="leave the source out, or give it a larger weight",
        )
    exact = [weight / total * cycle for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda s: (slots[s] - exact[s], s))
    for source in by_remainder[: cycle - sum(slots)]:
        slots[source] += 1
    return slots


class MixtureSampler:
    """Maps a global draw number to (source, index within the source).

    A fixed cycle of slots, spread evenly in proportion to `weights`, assigns a source to each draw;
    every source has its own epochs, each a complete permutation. The state is O(sources + cycle):
    no list of indices is stored.
    """

    def __init__(self, sizes: list[int], weights: list[float], seed: int) -> None:
        assert len(weights) == len(sizes), f"{len(weights)} weights for {len(sizes)} sources"
        assert all(size > 0 or w == 0 for size, w in zip(sizes, weights, strict=True)), (
            f"an empty source has a weight: sizes {sizes}, weights {weights}"
        )
        self.sizes = sizes
        self._slots = allocate_slots(weights)
        # Slot j of k stands at (j + 1/2) / k of the cycle: any prefix of the cycle holds each
        # source within a slot or two of its share.
        counts = np.array(self._slots)
        source = np.repeat(np.arange(counts.size), counts)
        rank = np.arange(source.size) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.lexsort((source, (rank + 0.5) / counts[source]))
        self._slot_source = source[order].astype(np.int32)
        self._slot_rank = rank[order].astype(np.int32)
        several = [_mix((seed + s * _GOLDEN) & _MASK) for s in range(counts.size)]
        self._seeds = several if len(sizes) > 1 else [seed]

    def _locate(self, i: int) -> tuple[int, int, int]:
        """(source, its epoch, draws of that epoch before this one) of global draw `i` >= 0."""
        assert i >= 0, f"draw {i}"
        cycle, slot = divmod(i, self._slot_source.size)
        source = int(self._slot_source[slot])
        drawn = cycle * self._slots[source] + int(self._slot_rank[slot])
        return source, *divmod(drawn, self.sizes[source])

    def draw(self, i: int) -> tuple[int, int]:
        """(source, index) of global draw number `i`."""
        source, epoch, within = self._locate(i)
        return source, permute(within, self.sizes[source], self._seeds[source], epoch)

    def epoch(self, i: int) -> int:
        """The number of complete passes over its source before draw `i`."""
        return self._locate(i)[1]
