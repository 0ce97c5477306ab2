"""Every preference loss against scalar float64 arithmetic, and worked by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from khaosz.config import PreferenceConfig
from khaosz.trainer.stages.losses import (
    Answers,
    implicit_rewards,
    log_odds,
    preference_loss,
    preferred,
    reward_loss,
)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def scalar(config: PreferenceConfig, c: list[float], r: list[float]) -> float:
    """The loss of one pair; c and r are (log p, log ref, tokens). Written from the papers."""
    beta, noise = config.beta, config.label_smoothing
    (pc, fc, nc), (pr, fr, nr) = c, r
    if config.loss == "simpo":
        gap = beta * pc / nc - beta * pr / nr - config.gamma
        loss = -(1 - noise) * log_sigmoid(gap) - noise * log_sigmoid(-gap)
    elif config.loss == "orpo":

        def odds(mean: float) -> float:
            return math.exp(mean) / (1 - math.exp(mean))

        ratio = math.log(odds(pc / nc) / odds(pr / nr))
        loss = -pc / nc - beta * log_sigmoid(ratio)
    else:
        won, lost = pc - fc, pr - fr
        if config.length_normalised:
            won, lost = won / nc, lost / nr
        gap = won - lost
        if config.loss == "sigmoid":
            loss = -(1 - noise) * log_sigmoid(beta * gap) - noise * log_sigmoid(-beta * gap)
        elif config.loss == "robust":
            loss = -(1 - noise) * log_sigmoid(beta * gap) + noise * log_sigmoid(-beta * gap)
            loss /= 1 - 2 * noise
        elif config.loss == "ipo":
            loss = (gap - 1 / (2 * beta)) ** 2
        else:
            loss = max(0.0, 1 - beta * gap)
    return loss - config.sft_weight * pc / nc


CONFIGS = [
    {"loss": loss, **more}
    for loss in ("sigmoid", "robust", "ipo", "hinge", "simpo", "orpo")
    for more in (
        {},
        {"beta": 0.5, "length_normalised": loss not in ("simpo", "orpo")},
        {
            "label_smoothing": 0.2 if loss in ("sigmoid", "robust", "simpo") else 0.0,
            "sft_weight": 0.3,
        },
    )
]


def pairs(seed: int, count: int = 6) -> list[tuple[list[float], list[float]]]:
    chance = random.Random(seed)

    def answer() -> list[float]:
        return [-chance.uniform(1, 40), -chance.uniform(1, 40), float(chance.randint(1, 12))]

    return [(answer(), answer()) for _ in range(count)]


def tensors(side: list[list[float]]) -> Answers:
    table = torch.tensor(side, dtype=torch.float64)
    return Answers(table[:, 0], table[:, 1], table[:, 2])


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_each_loss_is_the_papers(values: dict[str, object]) -> None:
    config = PreferenceConfig.parse(values)
    drawn = pairs(3)
    actual = preference_loss(tensors([c for c, _ in drawn]), tensors([r for _, r in drawn]), config)
    expected = [scalar(config, c, r) for c, r in drawn]
    # float64 against float64, in another order of operations.
    assert actual.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_gradients_are_those_of_the_loss(values: dict[str, object]) -> None:
    config = PreferenceConfig.parse(values)
    drawn = pairs(5)
    c, r = tensors([c for c, _ in drawn]), tensors([r for _, r in drawn])

    def loss(pc: torch.Tensor, pr: torch.Tensor) -> torch.Tensor:
        return preference_loss(
            Answers(pc, c.reference, c.tokens), Answers(pr, r.reference, r.tokens), config
        )

    inputs = (c.logprobs.clone().requires_grad_(), r.logprobs.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_dpo_by_hand() -> None:
    # Three tokens: log p = -1 -2 -3 chosen, -2 -2 -2 rejected; references -2 each: the log-ratios
    # are 0 and 0, then 1 and 0.
    config = PreferenceConfig.parse({"beta": 0.5})
    same = Answers(torch.tensor([-6.0]), torch.tensor([-6.0]), torch.tensor([3.0]))
    better = Answers(torch.tensor([-5.0]), torch.tensor([-6.0]), torch.tensor([3.0]))
    assert preference_loss(same, same, config).item() == pytest.approx(math.log(2), abs=1e-7)
    actual = preference_loss(better, same, config).item()
    assert actual == pytest.approx(math.log(1 + math.exp(-0.5)), abs=1e-7)
    assert implicit_rewards(better, config).item() == pytest.approx(0.5)


def test_noise_free_variants_agree() -> None:
    """cDPO and robust DPO are DPO when no label is wrong."""
    drawn = pairs(7)
    c, r = tensors([c for c, _ in drawn]), tensors([r for _, r in drawn])
    plain = preference_loss(c, r, PreferenceConfig.parse({"loss": "sigmoid"}))
    robust = preference_loss(c, r, PreferenceConfig.parse({"loss": "robust"}))
    assert torch.equal(plain, robust)


def test_reward_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    actual = reward_loss(chosen, rejected)
    assert actual.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])
    margin = torch.tensor([1.0, 0.0])
    with_margin = reward_loss(chosen, rejected, margin, centre=0.1)
    assert with_margin.tolist() == pytest.approx([math.log(2) + 0.9, math.log(2)])


def test_log_odds_near_certainty() -> None:
    actual = log_odds(torch.tensor([-1e-4, -0.5, -20.0], dtype=torch.float64))
    expected = [math.log(math.exp(x) / -math.expm1(x)) for x in (-1e-4, -0.5, -20.0)]
    assert actual.tolist() == pytest.approx(expected, rel=1e-12)


def test_tie_counts_half() -> None:
    actual = preferred(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0]))
    assert actual.tolist() == [1.0, 0.5, 0.0]
