"""The reward model's stage: which of two answers a person would rather have."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from khaosz.config import RewardConfig
from khaosz.data.sequences import SequenceBatch
from khaosz.model import RewardModel
from khaosz.trainer.alignment.logprobs import hidden_states
from khaosz.trainer.alignment.pairs import PairStrategy
from khaosz.trainer.alignment.preference_loss import preferred, reward_loss
from khaosz.trainer.strategy import Compute


def sequence_rewards(model: RewardModel, batch: SequenceBatch, compute: Compute) -> Tensor:
    """The reward (S,) of each sequence, read at its last real token. That is the token that ends
    the turn, unless the answer was cut."""
    hidden = hidden_states(model, batch, compute)
    return model.rewards(hidden.reshape(-1, hidden.shape[-1])[batch.ends])


@dataclass
class RMStrategy(PairStrategy):
    """L_RM = -E log sigma(r(x, y_chosen) - r(x, y_rejected) - margin), Bradley and Terry's model
    of choice (Ouyang et al. 2022, arXiv:2203.02155, equation 1)."""

    config: RewardConfig = field(default_factory=RewardConfig)
    stage: str = "rm"

    def __post_init__(self) -> None:
        self.shown = ("accuracy", "margin")

    def loss(self, model: RewardModel, batch: SequenceBatch, compute: Compute) -> Tensor:
        rewards = sequence_rewards(model, batch, compute)
        chosen, rejected = rewards[batch.fields["chosen"]], rewards[batch.fields["rejected"]]
        margin = batch.fields["margin"] if self.config.use_margins else None
        self.note(
            accuracy=preferred(chosen, rejected).sum(),
            margin=(chosen - rejected).sum(),
            reward_chosen=chosen.sum(),
            reward_rejected=rejected.sum(),
        )
        return reward_loss(chosen, rejected, margin, self.config.centre).sum()
