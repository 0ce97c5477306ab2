"""States of recurrent layers in a cache: the lengths it goes back to, and what is kept.

A runner over a tiny model is the reference: what a cache gives after it went back is what a cache
gives that was never further.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from khaosz.config.model_config import DELTA_NET
from khaosz.inference.prefix_cache import PrefixCache
from khaosz.inference.runner import Chunk, Runner
from khaosz.memory.inference import sequence_bytes
from khaosz.model.kv_cache import SequenceCache
from khaosz.model.states import SNAPSHOTS, States

IDS = torch.randint(0, 61, (2600,), generator=torch.Generator().manual_seed(0)).tolist()
TYPES = ("linear_attention", "full_attention", "linear_attention")


@pytest.fixture(scope="module")
def runner() -> Runner:
    shape = dict(zip(DELTA_NET, (1, 2, 8, 8, 4), strict=True))
    changes = {"layer_types": TYPES, "num_hidden_layers": 3, "attn_output_gate": True}
    model = tiny_model(std=0.2, max_position_embeddings=4096, **shape, **changes)
    return Runner.from_module(model)


def filled(runner: Runner, *counts: int) -> SequenceCache:
    """After passes of so many positions."""
    cache = runner.new_cache()
    for count in counts:
        runner.run([Chunk(IDS[cache.length : cache.length + count], cache)])
    return cache


def check(runner: Runner, cache: SequenceCache) -> None:
    """A cache continues as one whose positions were computed one by one."""
    length = cache.length
    fresh = filled(runner, *[min(64, length - i) for i in range(0, length, 64)])
    logits = [runner.run([Chunk(IDS[length : length + 3], each, 3)])[0] for each in (cache, fresh)]
    # The same numbers in fp32, summed in another order.
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [40, 41, 43, 44])
def test_a_draft_is_taken_back_in_part(runner: Runner, length: int) -> None:
    """A pass of four positions, to any length within it; and the same cache again."""
    cache = filled(runner, 39, 1, 4)
    fork = cache.fork(length)
    cache.truncate(length)
    assert cache.length == fork.length == length
    check(runner, fork)
    runner.run([Chunk(IDS[length : length + 2], cache, 2)])
    cache.truncate(length + 1)
    assert cache.length == length + 1
    check(runner, cache)


def test_bits_depend_on_the_past_alone(runner: Runner) -> None:
    """Deterministic: whatever the passes were, across tiles, and after drafts were taken back."""
    tiles = Runner(runner.config, runner.weights, deterministic=True)
    whole = filled(tiles, 45)
    for counts, length in (((3, 40, 1), 44), ((30, 5), 31), ((29, 4), 30), ((14, 4, 1, 1), 19)):
        cache = filled(tiles, *counts)
        cache.truncate(length)
        assert cache.length == length
        tiles.run([Chunk(IDS[length:45], cache)])
        one, other = (tiles.run([Chunk(IDS[45:46], c.fork(45))])[0] for c in (cache, whole))
        assert torch.equal(one, other)


def test_a_draft_across_a_kept_state(runner: Runner) -> None:
    cache = filled(runner, 510, 5)
    cache.truncate(511)
    assert cache.length == 511
    check(runner, cache)


def test_kept_states_are_few_and_spread(runner: Runner) -> None:
    """At multiples of 512 and 16 before the end of a pass; those that leave the least gap go."""
    cache = filled(runner, 300)
    assert [cache.reachable(n) for n in (300, 299, 284, 283)] == [300, 284, 284, 0]
    cache = filled(runner, 600, 600, 600, 600, 1)
    kept = sorted(cache.states._kept)
    assert len(kept) == SNAPSHOTS and kept[-1] == 2384 and cache.length == 2401
    longest = max(after - before for before, after in zip([0, *kept], kept, strict=False))
    assert longest <= 1024
    for length in (2401, *kept):
        check(runner, cache.fork(length + (length < 2400)))


def test_forks_share_nothing(runner: Runner) -> None:
    cache = filled(runner, 100)
    forks = [cache.fork(n) for n in (100, 90)]
    assert [fork.length for fork in forks] == [100, 84]
    for fork in forks:  # written on, one position after the other
        for token in (1, 2, 3):
            runner.run([Chunk([token], fork)])
    again = cache.fork(90)
    check(runner, cache)
    check(runner, again)


def test_memory_is_bounded_and_planned(runner: Runner) -> None:
    cache = filled(runner, 600, 600, 600, 1, 4)
    cache.reserve(2600)
    each = 4 * 2 * (3 * 32 + 2 * 8 * 8)  # fp32, two layers: inputs of 32 channels, two matrices
    states = cache.states.nbytes
    assert states == (SNAPSHOTS + 2) * each  # the current one, and that before the last pass
    # With tiles that before the last but one, too.
    assert states + each == States.bytes_at_most(runner.config.all_state_shapes)
    assert cache.nbytes <= sequence_bytes(runner.config, runner.cache_dtype, 2600)


def test_prefixes_continue_from_kept_states(runner: Runner) -> None:
    prefixes = PrefixCache(1 << 30)
    cache = filled(runner, 600)
    prefixes.put(IDS[:600], cache)
    other = [*IDS[:590], 60, 59, 58]
    found = prefixes.take(other)
    assert found is not None and found.length == 584 and found is not cache
    check(runner, found)
    # Continued to its end it is taken; without a kept state nothing is found.
    assert prefixes.take(IDS[:5]) is None and prefixes.take(IDS[:300]) is None
    assert prefixes.take(IDS[:700]) is cache and cache.length == 600
    check(runner, cache)
    running = filled(runner, 40)
    assert prefixes.take(IDS[:32], [(IDS, running)]) is not None
