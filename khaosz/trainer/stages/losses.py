"""The losses of alignment and embedding, as functions of numbers: no model and no batch.

Preference losses are functions of P pairs, policy losses of N answer tokens (L of one answer, S
answers of a rollout), InfoNCE of Q queries and P passages. Each returns one loss per pair, token or
query, in the type of its input. The formulas of the preference losses and their papers are listed
at `PreferenceConfig` and `RewardConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from khaosz.config import PreferenceConfig

# -- Preference pairs: reward models, DPO and its variants ------------------------------------


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of P answers, summed over their tokens, and the number of tokens."""

    logprobs: Tensor  # (P,) under the policy
    reference: Tensor | None  # (P,) under the reference
    tokens: Tensor  # (P,) float

    def ratio(self, per_token: bool) -> Tensor:
        """log pi(y|x) - log ref(y|x) (P,)."""
        assert self.reference is not None
        ratio = self.logprobs - self.reference
        return ratio / self.tokens if per_token else ratio

    @property
    def mean(self) -> Tensor:
        return self.logprobs / self.tokens


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centre: float = 0.0
) -> Tensor:
    """-log sigma(r_chosen - r_rejected - margin) + centre (r_chosen + r_rejected)^2 (P,): Bradley
    and Terry's model of choice (Ouyang et al. 2022, arXiv:2203.02155, equation 1)."""
    gap = chosen - rejected
    loss = -F.logsigmoid(gap if margin is None else gap - margin)
    return loss + centre * (chosen + rejected).square() if centre else loss


def preference_loss(chosen: Answers, rejected: Answers, config: PreferenceConfig) -> Tensor:
    """The configured loss of each pair (P,)."""
    beta, noise = config.beta, config.label_smoothing
    loss: Tensor
    if config.loss == "simpo":
        gap = beta * (chosen.mean - rejected.mean) - config.gamma
        loss = -(1 - noise) * F.logsigmoid(gap) - noise * F.logsigmoid(-gap)
    elif config.loss == "orpo":
        loss = -chosen.mean - beta * F.logsigmoid(log_odds(chosen.mean) - log_odds(rejected.mean))
    else:
        gap = chosen.ratio(config.length_normalised) - rejected.ratio(config.length_normalised)
        match config.loss:
            case "sigmoid":
                loss = -(1 - noise) * F.logsigmoid(beta * gap) - noise * F.logsigmoid(-beta * gap)
            case "robust":
                right, wrong = F.logsigmoid(beta * gap), F.logsigmoid(-beta * gap)
                loss = -((1 - noise) * right - noise * wrong) / (1 - 2 * noise)
            case "ipo":
                loss = (gap - 1 / (2 * beta)).square()
            case "hinge":
                loss = F.relu(1 - beta * gap)
    if config.sft_weight:
        loss = loss - config.sft_weight * chosen.mean
    return loss


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p < 0, without cancellation near p = 1."""
    return logprob - torch.log(-torch.expm1(logprob.clamp(max=-1e-7)))


def implicit_rewards(answers: Answers, config: PreferenceConfig) -> Tensor:
    """beta (log pi - log ref) (P,), the reward that DPO's policy implies (Rafailov et al. 2023,
    arXiv:2305.18290); without a reference beta times the mean log-probability, as in SimPO (Meng et
    al. 2024, arXiv:2405.14734). Detached."""
    if answers.reference is None:
        return (config.beta * answers.mean).detach()
    return (config.beta * answers.ratio(config.length_normalised)).detach()


def preferred(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen answer has the higher value, 0 where the lower, 0.5 at a tie (P,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


# -- Policy optimisation: PPO and GRPO ---------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (L,) of one answer (Schulman et al. 2016,
    arXiv:1506.02438). An answer is an episode: nothing is bootstrapped after its last token.

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
    """(values - mean) / std, with the mean and variance of all ranks."""
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def group_advantages(scores: Tensor, group: int, scale_by_std: bool) -> Tensor:
    """Advantages (S,) of answers to S / group prompts, each against its own group
    (GRPO, Shao et al. 2024, arXiv:2402.03300; without the division, Dr. GRPO, Liu et al. 2025,
    arXiv:2503.20783). A group of equal scores has advantages of zero."""
    grouped = scores.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale_by_std:
        centred = centred / (grouped.std(1, keepdim=True, correction=0) + 1e-4)
    return centred.reshape(-1)


def clipped_policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,) -min(r A, clip(r) A) with r = exp(new - old), and 1 where the clip applies (N,)
    (PPO, Schulman et al. 2017, arXiv:1707.06347)."""
    ratio = (logprobs - old).exp()
    plain = ratio * advantages
    bounded = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, bounded), (bounded < plain).to(logprobs.dtype)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Losses (N,) max((V - R)^2, (clip(V) - R)^2) / 2 with V clipped to `clip` around the old
    value, as in OpenAI's implementation of PPO."""
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


# -- Contrastive learning: embedders -----------------------------------------------------------


def info_nce(
    queries: Tensor,
    passages: Tensor,
    positive: Tensor,
    answers: Tensor,
    temperature: float,
    *,
    symmetric: bool = False,
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) of each query (Q,). Every passage of the
    batch that does not answer the query is a negative.

        L_i = -log( exp(q_i . p_i / t) / sum_j exp(q_i . p_j / t) ),   j over p_i and the negatives

    queries (Q, D), passages (P, D), positive (Q,) int64: p_i. answers (Q, P) bool: passages that
    answer the query in any record; all but p_i would be false negatives and are left out of the
    sum. `symmetric`: the mean of this loss and of the same from p_i to the queries, without the
    others that p_i answers (CLIP, Radford et al. 2021, arXiv:2103.00020).
    """
    scores = queries @ passages.t() / temperature
    rows = torch.arange(len(scores), device=scores.device)
    own = scores[rows, positive]
    chosen = F.one_hot(positive, len(passages)).bool()
    # Selected, not multiplied: a masked NaN stays out.
    loss = scores.masked_fill(answers & ~chosen, -torch.inf).logsumexp(1) - own
    if not symmetric:
        return loss
    back, answered = scores[:, positive].t(), answers[:, positive].t()  # (Q, Q): p_i with q_j
    others = answered & (rows[:, None] != rows)
    return (loss + back.masked_fill(others, -torch.inf).logsumexp(1) - own) / 2


def ranks(queries: Tensor, passages: Tensor, positive: Tensor, answers: Tensor) -> Tensor:
    """The rank of each query's passage (Q,) int64, from 1. Other passages that answer the query are
    left out. A tie counts against the passage, so that equal vectors do not score."""
    scores = queries @ passages.t()
    own = scores.gather(1, positive[:, None])
    others = ~answers & (scores >= own)
    return 1 + others.scatter(1, positive[:, None], False).sum(1)
