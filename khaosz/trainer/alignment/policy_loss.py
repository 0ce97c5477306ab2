"""The arithmetic of PPO and GRPO, as functions of numbers.

Shapes: N tokens of all answers of a batch, S answers, L tokens of one answer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (L,) of one answer (Schulman et al. 2016,
    arXiv:1506.02438). An answer is an episode: nothing is bootstrapped behind its last token.

    A_t = sum_l (gamma lam)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t;  return = A + V.
    """
    advantages = torch.zeros_like(rewards)
    running = rewards.new_zeros(())
    following = rewards.new_zeros(())
    for t in range(len(rewards) - 1, -1, -1):
        delta = rewards[t] + gamma * following - values[t]
        running = delta + gamma * lam * running
        advantages[t] = running
        following = values[t]
    return advantages, advantages + values


def token_rewards(score: Tensor, kl: Tensor, weight: float) -> Tensor:
    """Rewards (L,) of an answer: -weight KL at every token, and the score at the last one."""
    rewards = -weight * kl
    rewards[-1] += score
    return rewards


def whitened(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(values - mean) / std, with statistics the caller has taken over all ranks."""
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def group_advantages(scores: Tensor, group: int, scale_by_std: bool) -> Tensor:
    """Advantages (S,) of answers to S / group prompts, each against its own group
    (GRPO, Shao et al. 2024, arXiv:2402.03300; without the division, Dr. GRPO, Liu et al. 2025,
    arXiv:2503.20783). A group in which all answers score the same teaches nothing: zeros."""
    grouped = scores.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale_by_std:
        centred = centred / (grouped.std(1, keepdim=True, correction=0) + 1e-4)
    return centred.reshape(-1)


def clipped_policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,) -min(r A, clip(r) A) with r = exp(new - old), and where the clip held (N,)
    (PPO, Schulman et al. 2017, arXiv:1707.06347)."""
    ratio = (logprobs - old).exp()
    plain = ratio * advantages
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, bounded), (bounded < plain).to(logprobs.dtype)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Losses (N,) max((V - R)^2, (clip(V) - R)^2) / 2: a value may move by `clip` a rollout."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log pi - log ref (N,) of sampled tokens: unbiased, of high variance, can be negative
    (the names are those of Schulman 2020, http://joschu.net/blog/kl-approx.html)."""
    return logprobs - reference


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2 (N,): biased as a number, but its gradient on sampled tokens is
    KL(pi || ref)'s, where k3's is KL(ref || pi)'s (Tang and Munos 2025, arXiv:2506.09477)."""
    return 0.5 * (logprobs - reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = log ref - log pi (N,): unbiased, never negative, of low variance."""
    difference = reference - logprobs
    return difference.exp() - 1 - difference


class KLController:
    """The weight of the KL penalty: fixed, or adapted so that KL stays near a target
    (Ziegler et al. 2019, arXiv:1909.08593, equation 3)."""

    def __init__(self, weight: float, target: float | None, horizon: float) -> None:
        self.weight, self.target, self.horizon = weight, target, horizon

    def update(self, kl: float, answers: int) -> None:
        """`kl`: mean over `answers` answers, in nats per answer."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.weight *= 1 + error * answers / self.horizon
