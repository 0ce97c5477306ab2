"""Reward models, and direct preference optimisation and its variants."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from khaosz.config import PreferenceConfig, RewardConfig
from khaosz.data.batches.sequences import SequenceBatch
from khaosz.errors import TrainingError
from khaosz.model import RewardModel, Transformer
from khaosz.model.lora import without_lora
from khaosz.trainer.stages.logprobs import batch_logprobs
from khaosz.trainer.stages.losses import (
    Answers,
    implicit_rewards,
    preference_loss,
    reward_loss,
)
from khaosz.trainer.stages.pairs import PairStrategy
from khaosz.trainer.strategy import Compute, hidden_states


def sequence_rewards(model: RewardModel, batch: SequenceBatch, compute: Compute) -> Tensor:
    """The reward (S,) of each sequence at its last real token: the token that ends the turn, unless
    the answer was cut."""
    hidden = hidden_states(model, batch, compute)
    return model.rewards(hidden.reshape(-1, hidden.shape[-1])[batch.ends])


@dataclass
class RMStrategy(PairStrategy):
    """L_RM = -E log sigma(r(x, y_chosen) - r(x, y_rejected) - margin), Bradley and Terry's model
    of choice, as a mean over the pairs of each ranking (Ouyang et al. 2022, arXiv:2203.02155,
    equation 1)."""

    config: RewardConfig = field(default_factory=RewardConfig)

    def loss(self, model: RewardModel, batch: SequenceBatch, compute: Compute) -> Tensor:
        chosen, rejected = self.rewards(model, batch, compute)
        margin = batch.fields["margin"] if self.config.use_margins else None
        self.add_reward_metrics(batch, chosen, rejected)
        losses = reward_loss(chosen, rejected, margin, self.config.centre)
        return self.total(batch, losses)

    def rewards(
        self, model: RewardModel, batch: SequenceBatch, compute: Compute
    ) -> tuple[Tensor, Tensor]:
        rewards = sequence_rewards(model, batch, compute)
        return rewards[batch.fields["chosen"]], rewards[batch.fields["rejected"]]


@dataclass
class DPOStrategy(PairStrategy):
    """L_DPO = -E log sigma(beta (log-ratio of the chosen answer - log-ratio of the rejected)) with
    the log-ratio log pi(y|x) - log ref(y|x) (Rafailov et al. 2023, arXiv:2305.18290); the other
    losses are described at `PreferenceConfig`.

    The reference is a table of log-probabilities computed once, or the same model with its adapters
    off: never a second model in memory.
    """

    config: PreferenceConfig = field(default_factory=PreferenceConfig)
    by_adapters: bool = False

    def loss(self, model: Transformer, batch: SequenceBatch, compute: Compute) -> Tensor:
        chosen, rejected = self.answers(model, batch, compute)
        self._report(batch, chosen, rejected)
        losses = preference_loss(chosen, rejected, self.config)
        return self.total(batch, losses)

    def rewards(
        self, model: Transformer, batch: SequenceBatch, compute: Compute
    ) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.answers(model, batch, compute)
        return implicit_rewards(chosen, self.config), implicit_rewards(rejected, self.config)

    def answers(
        self, model: Transformer, batch: SequenceBatch, compute: Compute
    ) -> tuple[Answers, Answers]:
        """The chosen and the rejected answers of a batch's pairs."""
        logprobs = batch.per_sequence(batch_logprobs(model, batch, compute)[0])
        tokens = batch.per_sequence(torch.ones_like(batch.owners, dtype=logprobs.dtype))
        reference = self._reference(model, batch, compute)
        sides = []
        for side, name in enumerate(("chosen", "rejected")):
            index = batch.fields[name]
            frozen = None if reference is None else reference[:, side]
            sides.append(Answers(logprobs[index], frozen, tokens[index]))
        return sides[0], sides[1]

    def _reference(
        self, model: Transformer, batch: SequenceBatch, compute: Compute
    ) -> Tensor | None:
        """log ref (P, 2) of both answers of each pair."""
        if not self.config.needs_reference:
            return None
        if self.by_adapters:
            with without_lora(model):
                return reference_logprobs(model, batch, compute)
        table = batch.fields["reference"]
        if table.isnan().any():
            raise TrainingError("a pair has no reference log-probabilities")
        return table

    def _report(self, batch: SequenceBatch, chosen: Answers, rejected: Answers) -> None:
        won, lost = implicit_rewards(chosen, self.config), implicit_rewards(rejected, self.config)
        self.add_reward_metrics(batch, won, lost)
        self.add_pair_metrics(
            batch,
            logprob_chosen=chosen.mean,  # per token, so that a collapse shows
            logprob_rejected=rejected.mean,
            answer_tokens=(chosen.tokens + rejected.tokens) / 2,
        )
        if chosen.reference is not None and rejected.reference is not None:
            # The mean log-ratio of the data's answers: not an expectation under the policy, but a
            # measure of how far the policy has moved on this data.
            ratios = chosen.ratio(False) + rejected.ratio(False)
            shift = chosen.ratio(False) / chosen.tokens
            self.add_pair_metrics(batch, kl=ratios / 2, chosen_shift=shift)


@torch.no_grad()
def reference_logprobs(model: Transformer, batch: SequenceBatch, compute: Compute) -> Tensor:
    """Log-probabilities (P, 2) of the chosen and rejected answers under a frozen model."""
    sums = batch.per_sequence(batch_logprobs(model, batch, compute)[0])
    return torch.stack((sums[batch.fields["chosen"]], sums[batch.fields["rejected"]]), dim=1)
