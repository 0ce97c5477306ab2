"""A rollout: answers sampled from the policy, their rewards, and what the updates need of them.

Shapes: S answers, of L tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from khaosz.config import RolloutConfig
from khaosz.data.batches.sequences import TokenSequence
from khaosz.data.records.preference import Prompt
from khaosz.data.tokenizer import Tokenizer
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.model import Transformer, evaluating
from khaosz.trainer.stages.reward_sources import Answer

PER_TOKEN = ("old", "reference", "values", "advantages", "returns")


@dataclass
class Rollout:
    """Answers of this rank, and their numbers, each a list of one (L,) fp32 tensor per answer.

    old, reference  log-probabilities before the first update, of the policy and of the reference
    values          the critic's, before the first update (PPO)
    advantages      the value of each token beyond expectation
    returns         the critic's targets (PPO)
    """

    number: int
    sequences: list[TokenSequence]
    scores: Tensor  # (S,) rewards
    finished: Tensor  # (S,) bool: ended by itself, not by the length limit
    old: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    advantages: list[Tensor] = field(default_factory=list)
    returns: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """All fields, to be stored: ragged lists end to end with their lengths."""
        tensors = {
            "number": torch.tensor(self.number),
            "lengths": torch.tensor([len(s.ids) for s in self.sequences]),
            "scored_from": torch.tensor([s.scored_from for s in self.sequences]),
            "ids": torch.cat([torch.as_tensor(s.ids, dtype=torch.int64) for s in self.sequences]),
            "scores": self.scores,
            "finished": self.finished,
        }
        for name in PER_TOKEN:
            if parts := getattr(self, name):
                tensors[name] = torch.cat(parts)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rollout:
        """The inverse of `tensors`."""
        ids = torch.split(tensors["ids"], tensors["lengths"].tolist())
        sequences = [
            TokenSequence(sequence.tolist(), first)
            for sequence, first in zip(ids, tensors["scored_from"].tolist(), strict=True)
        ]
        rollout = cls(int(tensors["number"]), sequences, tensors["scores"], tensors["finished"])
        scored = [s.scored for s in sequences]
        for name in PER_TOKEN:
            if name in tensors:
                setattr(rollout, name, list(torch.split(tensors[name], scored)))
        return rollout


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    seeds: Sequence[int],
) -> list[Answer]:
    """`group` answers to each prompt, those of one prompt side by side, with one seed per answer.

    Only the temperature shapes the distribution: a filter (top_p, a penalty) would sample from
    another policy than the one whose log-probabilities are computed.
    """
    repeated = [prompt for prompt in prompts for _ in range(config.group)]
    contexts = [prompt.prompt_ids for prompt in repeated]
    params = [
        SamplingParams(max_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed)
        for seed in seeds
    ]
    with evaluating(model):
        completions = Generator(model, tokenizer).generate_batch(
            [ids.tolist() for ids in contexts if ids is not None], params
        )
    return [
        Answer(prompt, one.ids, one.text, one.finish_reason == "stop")
        for prompt, one in zip(repeated, completions, strict=True)
    ]
