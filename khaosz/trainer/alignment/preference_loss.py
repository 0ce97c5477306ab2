"""Losses of preference pairs, as functions of numbers: no model, no batch, no configuration file.

Shapes: P pairs. Each function returns one loss per pair (P,), in the type of its input.
The formulas and their sources stand at `PreferenceConfig` and `RewardConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from khaosz.config import PreferenceConfig


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of P answers, summed over their tokens, and how many tokens those are."""

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
    """-log sigma(r_chosen - r_rejected - margin) + centre (r_chosen + r_rejected)^2."""
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
    """beta (log pi - log ref) (P,): what DPO's policy says each answer is worth; without a
    reference beta times the mean log-probability, as SimPO reads it. Detached."""
    if answers.reference is None:
        return (config.beta * answers.mean).detach()
    return (config.beta * answers.ratio(config.length_normalised)).detach()


def preferred(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen answer is worth more, 0 where less, a half where neither (P,)."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
