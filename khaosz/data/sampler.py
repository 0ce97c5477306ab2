"""Which window comes next, as a pure function of the draw number.

Nothing is shuffled in memory and nothing has to be saved: the order of an epoch is a keyed
permutation that is computed one index at a time, so a run resumes by recomputing from its step
number, at any world size.

The permutation is a balanced Feistel network (Luby and Rackoff 1988) over the next power of four,
restricted to [0, n) by cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). The domain is less than 4 n, so a walk takes fewer than 4 steps on average.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from math import isfinite

import numpy as np
import numpy.typing as npt

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


def _half_bits(n: int) -> int:
    """k such that 4^k is the smallest power of four that is at least n."""
    return ((n - 1).bit_length() + 1) // 2


def permute(index: int, n: int, seed: int, epoch: int) -> int:
    """Where `index` goes in the permutation of [0, n) that belongs to (seed, epoch)."""
    assert 0 <= index < n, f"index {index} outside [0, {n})"
    bits = _half_bits(n)
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


def permute_array(
    index: npt.ArrayLike, n: int, seed: int, epoch: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`permute` of every element of a one-dimensional `index`, as int64."""
    value = np.asarray(index).astype(np.uint64)
    assert value.ndim == 1 and (value.size == 0 or int(value.max()) < n), f"outside [0, {n})"
    bits, low = np.uint64(_half_bits(n)), np.uint64((1 << _half_bits(n)) - 1)
    keys = [np.uint64(key) for key in _round_keys(seed, epoch)]
    walking = np.arange(value.size)
    while walking.size:
        left, right = value[walking] >> bits, value[walking] & low
        for key in keys:
            x = right + key  # uint64 arrays wrap around, which is what the masks above do
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((x ^ (x >> np.uint64(31))) & low)
        moved = (left << bits) | right
        value[walking] = moved
        walking = walking[moved >= np.uint64(n)]
    return value.astype(np.int64)


def draws_for(step: int, global_batch: int, rank: int, world: int) -> range:
    """The draws of one rank in one step: every world-th of [step * G, (step + 1) * G)."""
    assert 0 <= rank < world, f"rank {rank} of {world}"
    return range(step * global_batch + rank, (step + 1) * global_batch, world)


def allocate_slots(weights: list[float]) -> list[int]:
    """Whole slots of a cycle in proportion to `weights`, by the largest remainder.

    The cycle has `CYCLE` slots, doubled until the smallest positive weight gets one.

    Raises ConfigError for a weight that is negative, not finite or below a millionth of the sum,
    and when all are zero.
    """
    for weight in weights:
        if not isfinite(weight) or weight < 0:
            raise ConfigError(
                f"a mixing weight must be a number of at least 0, got {weight}",
                hint="weights are relative shares, for example 2 and 1",
            )
    total = sum(weights)
    if total <= 0:
        raise ConfigError("all mixing weights are 0", hint="give at least one source a weight")
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

    Without weights the sources are one concatenation and an epoch visits each index once. With
    weights a fixed cycle of slots, spread evenly, says which source a draw takes; every source
    goes through its own epochs, each a complete permutation, however often it is repeated.

    The state is O(sources + cycle): no list of indices exists anywhere.
    """

    def __init__(self, sizes: list[int], weights: list[float] | None, seed: int) -> None:
        assert sizes and all(size >= 0 for size in sizes) and sum(sizes) > 0, f"sizes {sizes}"
        self.sizes = list(sizes)
        self.seed = seed
        self._ends = list(accumulate(sizes))
        self._slots: list[int] | None = None
        if weights is None:
            return
        assert len(weights) == len(sizes), f"{len(weights)} weights for {len(sizes)} sources"
        assert all(size > 0 or w == 0 for size, w in zip(sizes, weights, strict=True)), (
            f"an empty source has a weight: sizes {sizes}, weights {weights}"
        )
        self._slots = allocate_slots(list(weights))
        # Slot j of k stands at (j + 1/2) / k of the cycle: any prefix of the cycle holds each
        # source within a slot or two of its share.
        counts = np.array(self._slots)
        source = np.repeat(np.arange(counts.size), counts)
        rank = np.arange(source.size) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.lexsort((source, (rank + 0.5) / counts[source]))
        self._slot_source = source[order].astype(np.int32)
        self._slot_rank = rank[order].astype(np.int32)
        self._source_seeds = [_mix((seed + s * _GOLDEN) & _MASK) for s in range(counts.size)]

    def _locate(self, i: int) -> tuple[int, int]:
        """(source, how often it was drawn before draw i); (0, i) for the concatenation."""
        assert i >= 0, f"draw {i}"
        if self._slots is None:
            return 0, i
        cycle, slot = divmod(i, self._slot_source.size)
        source = int(self._slot_source[slot])
        return source, cycle * self._slots[source] + int(self._slot_rank[slot])

    def draw(self, i: int) -> tuple[int, int]:
        """(source, index) of global draw number `i` >= 0."""
        source, counter = self._locate(i)
        if self._slots is None:
            n = self._ends[-1]
            flat = permute(counter % n, n, self.seed, counter // n)
            source = bisect_right(self._ends, flat)
            return source, flat - (self._ends[source] - self.sizes[source])
        epoch, within = divmod(counter, self.sizes[source])
        return source, permute(within, self.sizes[source], self._source_seeds[source], epoch)

    def epoch(self, i: int) -> int:
        """How many complete passes over its source lie behind draw `i`."""
        source, counter = self._locate(i)
        return counter // (self._ends[-1] if self._slots is None else self.sizes[source])
