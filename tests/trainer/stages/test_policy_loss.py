"""The arithmetic of PPO and GRPO against loops in float64."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from khaosz.trainer.stages.losses import (
    KLController,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    group_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    token_rewards,
    whitened,
)


def test_gae_by_hand() -> None:
    rewards = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    values = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    # gamma = 1, lambda = 0.5: deltas are -0.25, 0.5, 0.25.
    advantages, returns = gae(rewards, values, 1.0, 0.5)
    assert advantages.tolist() == pytest.approx([-0.25 + 0.5 * 0.625, 0.5 + 0.125, 0.25])
    assert returns.tolist() == pytest.approx([0.5625, 0.875, 1.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_gae_is_the_sum_of_its_definition(gamma: float, lam: float) -> None:
    chance = random.Random(1)
    rewards = [chance.gauss(0, 1) for _ in range(7)]
    values = [chance.gauss(0, 1) for _ in range(7)]
    deltas = [
        r + gamma * (values[t + 1] if t < 6 else 0.0) - values[t] for t, r in enumerate(rewards)
    ]
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(7 - t)) for t in range(7)]
    as_tensors = (torch.tensor(x, dtype=torch.float64) for x in (rewards, values))
    advantages, returns = gae(*as_tensors, gamma, lam)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=True)])


def test_score_is_given_at_the_last_token() -> None:
    kl = torch.tensor([0.1, -0.2, 0.3])
    actual = token_rewards(torch.tensor(2.0), kl, 0.5)
    assert actual.tolist() == pytest.approx([-0.05, 0.1, 1.85])


def test_clip_applies_to_the_side_that_gains() -> None:
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64))
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    losses, tensors = clipped_policy_loss(new, old, advantages, 0.2)
    assert losses.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    assert tensors.tolist() == [1, 0, 0, 1]


def test_only_unclipped_ratios_have_a_gradient() -> None:
    new = torch.log(torch.tensor([1.5, 1.1], dtype=torch.float64)).requires_grad_()
    old = torch.zeros(2, dtype=torch.float64)
    losses, _ = clipped_policy_loss(new, old, torch.ones(2, dtype=torch.float64), 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    assert gradient.tolist() == pytest.approx([0.0, -1.1])


def test_values_are_clipped_to_the_old_ones() -> None:
    values = torch.tensor([1.0, 0.1])
    old, returns = torch.zeros(2), torch.tensor([1.0, 1.0])
    actual = clipped_value_loss(values, old, returns, 0.2)
    assert actual.tolist() == pytest.approx([0.5 * 0.64, 0.5 * 0.81])


def test_estimators_of_kl() -> None:
    """k1 averages to KL and can be negative; k3 averages to it too and can't."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = float((p * (p / q).log()).sum())
    for estimator in (kl_k1, kl_k3):
        assert float((p * estimator(p.log(), q.log())).sum()) == pytest.approx(exact, rel=1e-12)
    assert kl_k1(p.log(), q.log()).min() < 0 <= kl_k3(p.log(), q.log()).min()
    assert kl_k3(p.log(), q.log())[0].item() == pytest.approx(0.4 / 0.7 - 1 - math.log(0.4 / 0.7))


def test_gradients_of_the_kl_estimators() -> None:
    """On sampled tokens k2 follows KL(pi || ref) and k3 KL(ref || pi)."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)

    def gradient(loss: torch.Tensor) -> list[float]:
        return torch.autograd.grad(loss, logits)[0].tolist()

    p = logits.softmax(-1)
    weights = p.detach()  # the weights of sampling
    reverse, forward = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    for estimator, expected in ((kl_k2, reverse), (kl_k3, forward)):
        logprobs = logits.log_softmax(-1)
        actual = gradient((weights * estimator(logprobs, q.log())).sum())
        again = torch.autograd.grad(expected, logits, retain_graph=True)[0].tolist()
        assert actual == pytest.approx(again, rel=1e-10)


def test_groups_are_normalised_separately() -> None:
    scores = [1.0, 3.0, 10.0, 10.0]
    actual = group_advantages(torch.tensor(scores, dtype=torch.float64), 2, True).tolist()
    deviation = statistics.pstdev(scores[:2])
    assert actual == pytest.approx([-1 / (deviation + 1e-4), 1 / (deviation + 1e-4), 0, 0])
    plain = group_advantages(torch.tensor(scores), 2, False).tolist()
    assert plain == [-1, 1, 0, 0]


def test_whitening() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    actual = whitened(values, values.mean(), values.var(correction=0))
    assert actual.mean().item() == pytest.approx(0, abs=1e-9)
    assert actual.std(correction=0).item() == pytest.approx(1, rel=1e-6)


def test_kl_weight_follows_its_target() -> None:
    fixed = KLController(0.1, None, 100.0)
    fixed.update(50.0, 10)
    assert fixed.weight == 0.1
    adaptive = KLController(0.1, 2.0, 100.0)
    adaptive.update(2.2, 10)  # a tenth too far: 1 + 0.1 * 10 / 100
    assert adaptive.weight == pytest.approx(0.101)
    adaptive.update(200.0, 10)  # clipped at 0.2
    assert adaptive.weight == pytest.approx(0.101 * 1.02)
    adaptive.update(0.0, 10)
    assert adaptive.weight == pytest.approx(0.101 * 1.02 * 0.98)
