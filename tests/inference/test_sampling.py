"""Filters against an independent float64 reference, samples against the exact distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from khaosz.errors import GenerationError
from khaosz.inference.sampling import SamplingParams, filtered_logits, sample

torch.set_num_threads(1)

NOTHING_SEEN = torch.zeros(0, dtype=torch.long)


def reference(logits: list[float], params: SamplingParams, seen: list[int]) -> NDArray[np.float64]:
    """Probabilities (V,), token by token: penalty, temperature, top-k, top-p, min-p."""
    x = np.array(logits, dtype=np.float64)
    for token in set(seen):
        penalty = params.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    x = x / params.temperature

    def probabilities() -> NDArray[np.float64]:
        e = np.exp(x - x.max())
        return np.asarray(e / e.sum())

    if params.top_k:
        kept = set(np.argsort(-x)[: params.top_k].tolist())
        x = np.array([v if i in kept else -np.inf for i, v in enumerate(x)])
    if params.top_p < 1:
        p, mass, kept = probabilities(), 0.0, set()
        for token in np.argsort(-p):
            if kept and mass >= params.top_p:
                break
            kept.add(int(token))
            mass += p[token]
        x = np.array([v if i in kept else -np.inf for i, v in enumerate(x)])
    if params.min_p:
        p = probabilities()
        x = np.where(p < params.min_p * p.max(), -np.inf, x)
    return probabilities()


def ours(logits: list[float], params: SamplingParams, seen: list[int]) -> NDArray[np.float64]:
    filtered = filtered_logits(torch.tensor(logits), params, torch.tensor(seen, dtype=torch.long))
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
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
    seen=st.lists(st.integers(0, 1), max_size=4),
)
def test_filters_are_those_of_the_reference(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seen: list[int],
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    expected, found = reference(logits, params, seen), ours(logits, params, seen)
    # fp32 softmax: relative rounding of 1e-7 times exponents of at most 60. A filter that decided
    # otherwise would differ by a whole probability; those below 1e-6 can't be told from rounding.
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"temperature": 1.4, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_samples_follow_the_exact_distribution(changes: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **changes})
    logits = [1.0, 0.5, 0.0, -0.5, 2.0, -3.0, 0.25, 1.5]
    generator = torch.Generator().manual_seed(11)
    tensor, seen = torch.tensor(logits), torch.tensor([4, 5])
    draws = 4_000
    counts = np.zeros(len(logits))
    for _ in range(draws):
        counts[sample(tensor, params, seen, generator)] += 1
    p = reference(logits, params, [4, 5])
    assert not counts[p == 0].any()
    expected = p[p > 0] * draws
    statistic = float(((counts[p > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    # Wilson and Hilferty's cube root: the 99.9% quantile of chi-square, 3.09 normal deviations.
    # The seed is fixed, so this fails for a wrong distribution only.
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals() -> None:
    params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=0.5)
    assert sample(torch.tensor([0.0, 3.0, 3.0, -1.0]), params, NOTHING_SEEN) == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-10, 1e-4])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_tiny_temperature_does_not_overflow(temperature: float, scale: float) -> None:
    params = SamplingParams(temperature=temperature)
    logits = torch.tensor([1.0, 3.0, 2.0]) * scale
    assert sample(logits, params, NOTHING_SEEN) == 1


def test_equals_at_the_edge_of_top_k_all_stay() -> None:
    kept = ours([2.0, 1.0, 1.0, 0.0], SamplingParams(temperature=1.0, top_k=2), [])
    assert (kept > 0).tolist() == [True, True, True, False]


def test_one_token_always_stays() -> None:
    params = SamplingParams(temperature=1.0, top_p=1e-9, min_p=0.999)
    assert (ours([0.1, 0.2, 0.0], params, []) > 0).tolist() == [False, True, False]


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    logits = torch.tensor([4.0, -4.0, 3.0, -3.0])
    seen = torch.tensor([0, 1, 1, 0, 1])  # how often does not matter
    assert filtered_logits(logits, params, seen).tolist() == [2.0, -8.0, 3.0, -3.0]
    assert sample(logits, params, seen) == 2
    assert filtered_logits(logits, params, NOTHING_SEEN).tolist() == logits.tolist()


def test_sampling_leaves_the_logits_alone() -> None:
    logits = torch.tensor([4.0, -4.0, 3.0])
    before = logits.clone()
    params = SamplingParams(top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=2.0)
    sample(logits, params, torch.tensor([0]))
    assert torch.equal(logits, before)


def test_a_generator_makes_it_reproducible() -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        params = SamplingParams(temperature=1.0)
        return [sample(torch.zeros(50), params, NOTHING_SEEN, generator) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_explained(temperature: float, bad: float) -> None:
    with pytest.raises(GenerationError, match="not finite"):
        sample(torch.tensor([0.0, bad]), SamplingParams(temperature=temperature), NOTHING_SEEN)


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
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=f"^{name} must be "):
        SamplingParams(**{name: value})


def test_the_largest_seed_works() -> None:
    torch.Generator().manual_seed(SamplingParams(seed=2**63 - 1).seed or 0)
