"""A Transformer with a scalar output: one reward or value per position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig
from khaosz.model.transformer import Transformer, parameter_shapes


class RewardModel(Transformer):
    """The network with a scalar head in place of the vocabulary.

    As a reward model it is read at a sequence's last token, as transformers reads a one-label
    sequence classifier; as a critic at every token of an answer.
    """

    def __init__(self, config: ModelConfig) -> None:
        # The tied setting creates no vocabulary head, which would stay untrained.
        super().__init__(config.updated(tie_word_embeddings=True))
        self.config = config
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    @classmethod
    def from_transformer(
        cls, model: Transformer, generator: torch.Generator | None = None
    ) -> RewardModel:
        """A reward model with a copy of a language model's body.

        Without a `generator` its head is zero: the values that a critic starts with. With one, on
        the CPU, it is small and random: a zero head gets no gradient from two answers with the
        same end, and passes none to the body.
        """
        reward = cls(model.config)
        body = {n: v for n, v in model.state_dict().items() if not n.startswith("lm_head.")}
        reward.load_state_dict({**body, "score.weight": reward.score.weight})
        if generator is None:
            nn.init.zeros_(reward.score.weight)
        else:
            spread = 0.1 * model.config.hidden_size**-0.5
            nn.init.normal_(reward.score.weight, std=spread, generator=generator)
        return reward.to(model.embed_tokens.weight.device)

    def rewards(self, hidden: Tensor) -> Tensor:
        """Rewards (...) of hidden states (..., D), fp32 or wider."""
        wide = torch.promote_types(hidden.dtype, self.score.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.score.weight.to(wide)).squeeze(-1)


def reward_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a reward model's parameters."""
    shapes = parameter_shapes(config)
    shapes.pop("lm_head.weight", None)
    return {**shapes, "score.weight": (1, config.hidden_size)}
