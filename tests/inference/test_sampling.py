"""Filters against an independent float64 reference, samples against the exact distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from khaosz.errors import GenerationError
from khaosz.inference.sampling import (
    GumbelNoise,
    SamplingParams,
    TokenCounts,
    _hashed,
    filtered_logits,
    needs_counts,
    sample,
)

torch.set_num_threads(1)

NOISE = GumbelNoise(7, 0)


def counts_of(size: int, prompt: list[int], output: list[int]) -> TokenCounts:
    counts = TokenCounts(size, prompt)
    for token in output:
        counts.add(token)
    return counts


def reference(
    logits: list[float], params: SamplingParams, seen: list[int], output: Sequence[int] = ()
) -> NDArray[np.float64]:
    """Probabilities (V,), token by token: bias, penalties, temperature, top-k, top-p, min-p,
    typical-p."""
    x = np.array(logits, dtype=np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in {*seen, *output}:
        penalty = params.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(output):
        x[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    x = x / params.temperature

    def probabilities() -> NDArray[np.float64]:
        e = np.exp(x - x.max())
        return np.asarray(e / e.sum())

    if params.top_k:
        saved = set(np.argsort(-x)[: params.top_k].tolist())
        x = np.array([v if i in saved else -np.inf for i, v in enumerate(x)])
    if params.top_p < 1:
        p, mass, saved = probabilities(), 0.0, set()
        for token in np.argsort(-p):
            if saved and mass >= params.top_p:
                break
            saved.add(int(token))
            mass += p[token]
        x = np.array([v if i in saved else -np.inf for i, v in enumerate(x)])
    if params.min_p:
        p = probabilities()
        x = np.where(p < params.min_p * p.max(), -np.inf, x)
    if params.typical_p < 1:
        p, mass, saved = probabilities(), 0.0, set()
        alive = [i for i in range(len(p)) if p[i] > 0]
        entropy = -sum(p[i] * math.log(p[i]) for i in alive)
        for token in sorted(alive, key=lambda i: abs(-math.log(p[i]) - entropy)):
            if saved and mass >= params.typical_p:
                break
            saved.add(token)
            mass += p[token]
        x = np.array([v if i in saved else -np.inf for i, v in enumerate(x)])
    return probabilities()


def ours(
    logits: list[float], params: SamplingParams, seen: list[int], output: Sequence[int] = ()
) -> NDArray[np.float64]:
    counts = counts_of(len(logits), seen, list(output)) if needs_counts(params) else None
    filtered = filtered_logits(torch.tensor(logits), params, counts)
    return filtered.softmax(-1).double().numpy()


# Distinct logits a hundredth apart at least, so that no tie and no fp32 rounding decides a filter.
LOGITS = st.lists(st.integers(-900, 900), min_size=2, max_size=40, unique=True).map(
    lambda values: [value / 100 for value in values]
)


@settings(max_examples=200, deadline=None)
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 10, 1000]),
    top_p=st.sampled_from([1.0, 0.9512345, 0.5012345, 0.0112345]),
    min_p=st.sampled_from([0.0, 0.0512345, 0.9012345]),
    typical_p=st.sampled_from([1.0, 0.9012345, 0.2012345]),
    penalties=st.sampled_from([(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (0.7, 0.51, -0.33)]),
    bias=st.sampled_from([{}, {0: 1.2345, 1: -3.2123}]),
    seen=st.lists(st.integers(0, 1), max_size=4),
    output=st.lists(st.integers(0, 1), max_size=4),
)
def test_filters_match_reference(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    penalties: tuple[float, float, float],
    bias: dict[int, float],
    seen: list[int],
    output: list[int],
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        logit_bias=bias,
        repetition_penalty=penalties[0],
        presence_penalty=penalties[1],
        frequency_penalty=penalties[2],
    )
    expected = reference(logits, params, seen, output)
    result = ours(logits, params, seen, output)
    # fp32 softmax: relative rounding of 1e-7 times exponents of at most 60. A filter that decided
    # otherwise would differ by a whole probability; those below 1e-6 are rounding.
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"typical_p": 0.6},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"logit_bias": {4: -1.5, 5: 3.0}},
        {"temperature": 1.4, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_samples_follow_the_exact_distribution(changes: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **changes})
    logits = [1.0, 0.5, 0.0, -0.5, 2.0, -3.0, 0.25, 1.5]
    tensor, noise = torch.tensor(logits), GumbelNoise(11, 0)
    seen = counts_of(len(logits), [4, 5], [5, 5]) if needs_counts(params) else None
    draws = 4_000
    counts = np.zeros(len(logits))
    for i in range(draws):
        counts[sample(tensor, params, seen, noise, i)] += 1
    p = reference(logits, params, [4, 5], [5, 5])
    assert not counts[p == 0].any()
    expected = p[p > 0] * draws
    statistic = float(((counts[p > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    # Wilson and Hilferty's cube root: the 99.9% quantile of chi-square, 3.09 normal deviations.
    # The seed is fixed, so this fails for a wrong distribution only.
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


def test_temperature_zero_takes_first_of_equal_maxima() -> None:
    params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=0.5)
    assert sample(torch.tensor([0.0, 3.0, 3.0, -1.0]), params, None, NOISE, 0) == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-10, 1e-4])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_tiny_temperature_does_not_overflow(temperature: float, scale: float) -> None:
    params = SamplingParams(temperature=temperature)
    logits = torch.tensor([1.0, 3.0, 2.0]) * scale
    assert sample(logits, params, None, NOISE, 0) == 1


def test_top_k_keeps_ties_at_threshold() -> None:
    saved = ours([2.0, 1.0, 1.0, 0.0], SamplingParams(temperature=1.0, top_k=2), [])
    assert (saved > 0).tolist() == [True, True, True, False]


def test_filters_keep_at_least_one_token() -> None:
    params = SamplingParams(temperature=1.0, top_p=1e-9, min_p=0.999)
    assert (ours([0.1, 0.2, 0.0], params, []) > 0).tolist() == [False, True, False]


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    logits = torch.tensor([4.0, -4.0, 3.0, -3.0])
    seen = counts_of(4, [0, 1, 1], [0, 1])  # how often does not matter
    assert filtered_logits(logits, params, seen).tolist() == [2.0, -8.0, 3.0, -3.0]
    assert sample(logits, params, seen, NOISE, 0) == 2
    assert filtered_logits(logits, params, counts_of(4, [], [])).tolist() == logits.tolist()


def test_sampling_does_not_modify_logits() -> None:
    logits = torch.tensor([4.0, -4.0, 3.0])
    before = logits.clone()
    params = SamplingParams(top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=2.0)
    sample(logits, params, counts_of(3, [0], []), NOISE, 0)
    assert torch.equal(logits, before)


def test_noise_depends_only_on_seed_choice_position_and_token() -> None:
    ids = np.arange(500)
    noise = GumbelNoise(1, 0).at(7, ids)
    assert noise.isfinite().all() and len(noise.unique()) == 500
    assert torch.equal(GumbelNoise(1, 0).at(7, ids), noise), "whatever was drawn before"
    some = np.array([499, 3, 40])  # as candidates that a filter left
    assert torch.equal(GumbelNoise(1, 0).at(7, some), noise[some])
    for other in (
        GumbelNoise(1, 0).at(8, ids),
        GumbelNoise(1, 1).at(7, ids),
        GumbelNoise(2, 0).at(7, ids),
        GumbelNoise(None, 0).at(7, ids),
    ):
        assert not np.isin(other.numpy(), noise.numpy()).any()
    assert not torch.equal(GumbelNoise(None, 0).at(0, ids), GumbelNoise(None, 0).at(0, ids))


def test_noise_is_the_same_on_every_platform() -> None:
    """SplitMix64's published outputs for the state 1234567, and values that must never change."""
    outputs = _hashed(np.array([1234567], np.uint64), np.arange(3))
    assert outputs.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    # The last bit may differ between mathematics libraries.
    noise = GumbelNoise(42, 3).at(1000, np.array([0, 1, 151_935]))
    expected = [-0.38997572584350887, -0.02943792276629932, -0.7260935956698346]
    assert noise.tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("axis", ["tokens", "positions", "seeds", "choices"])
def test_noise_follows_the_gumbel_distribution(axis: str) -> None:
    count, one = 20_000, np.array([5])
    match axis:
        case "tokens":
            values = GumbelNoise(3, 0).at(9, np.arange(count))
        case "positions":
            values = torch.cat([GumbelNoise(3, 0).at(i, one) for i in range(count)])
        case "seeds":  # consecutive ones, as rollouts use them
            values = torch.cat([GumbelNoise((3 << 40) + i, 0).at(9, one) for i in range(count)])
        case _:
            values = torch.cat([GumbelNoise(3, i).at(9, one) for i in range(count)])
    theory = np.exp(-np.exp(-np.sort(values.numpy())))
    steps = np.arange(count + 1) / count
    distance = max((steps[1:] - theory).max(), (theory - steps[:-1]).max())
    # Kolmogorov and Smirnov: the 99.9% quantile. The seeds are fixed.
    assert distance < 1.95 / math.sqrt(count)
    pairs = np.corrcoef(values[:-1].numpy(), values[1:].numpy())[0, 1]
    assert abs(pairs) < 3.3 / math.sqrt(count)  # as many standard deviations


def test_rounding_of_logits_hardly_changes_tokens() -> None:
    """As a cached prefix or another batch moves them. By inversion 2% of the tokens changed."""
    generator = torch.Generator().manual_seed(0)
    params, changed = SamplingParams(temperature=1.0), 0
    for position in range(400):
        logits = torch.randn(4000, generator=generator) * 3
        moved = logits + torch.randn(4000, generator=generator) * 0.003
        one, other = (sample(x, params, None, NOISE, position) for x in (logits, moved))
        changed += one != other
    assert changed <= 2


def test_filters_do_not_change_a_token_that_survives() -> None:
    generator = torch.Generator().manual_seed(0)
    filters = [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}]
    for position in range(50):
        logits = torch.randn(300, generator=generator) * 3
        token = sample(logits, SamplingParams(temperature=1.0), None, NOISE, position)
        for each in filters:
            params = SamplingParams(temperature=1.0, **each)  # type: ignore[arg-type]
            if filtered_logits(logits, params)[token] > -math.inf:
                assert sample(logits, params, None, NOISE, position) == token


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_large_vocabulary_filters_like_small_one(top_p: float) -> None:
    """The likeliest thousand first, the whole order only where they don't hold the mass."""
    for spread in (0.05, 3.0):
        logits = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) * spread).tolist()
        params = SamplingParams(temperature=1.0, top_p=top_p)
        result, expected = ours(logits, params, []), reference(logits, params, [])
        # The edge of the mass may fall one token further by fp32 rounding of 5,000 summands.
        assert abs(int((result > 0).sum()) - int((expected > 0).sum())) <= 2
        np.testing.assert_allclose(result, expected, atol=2e-4)


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((1000,), -math.inf)
    logits[[17, 900]] = torch.tensor([-60.0, -80.0])  # far less likely than noise is large
    drawn = {sample(logits, SamplingParams(temperature=1.0), None, NOISE, i) for i in range(100)}
    assert drawn == {17}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_are_reported(temperature: float, bad: float) -> None:
    with pytest.raises(GenerationError, match="not finite"):
        sample(torch.tensor([0.0, bad]), SamplingParams(temperature=temperature), None, NOISE, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("typical_p", 0.0),
        ("typical_p", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("n", 0),
        ("n", 129),
        ("logprobs", -1),
        ("logprobs", 21),
        ("stop", ("x",) * 17),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", ("a", "")),
        ("stop", ("a", "x" * 1025)),
    ],
)
def test_out_of_range_values_are_rejected_by_name(name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=f"^{name} must be "):
        SamplingParams(**{name: value})


def test_largest_seed() -> None:
    seed = SamplingParams(seed=2**64 - 1).seed
    assert GumbelNoise(seed, 127).at(2**40, np.array([2**31])).isfinite().all()
