"""Strategies of the alignment stages on the tiny policy, without a run around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from khaosz.config import RolloutConfig
from khaosz.data.records.preference import load_prompts
from khaosz.data.tokenizer import Tokenizer
from khaosz.model import RewardModel, Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.stages.reward_sources import FunctionReward
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.strategy import BatchLayout, Compute

CPU = ParallelContext(torch.device("cpu"))
Make = Callable[..., RLHFStrategy]


def length_reward(messages: list[Any], answer: str, extra: dict[str, Any]) -> float:
    return float(len(answer))


def shifted(module: Transformer, seed: int = 2, by: float = 0.02) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
    return module


def rlhf_strategies(policy: Transformer, tokenizer: Tokenizer, prompts_file: Path) -> Make:
    """`make("ppo", key=value)`: a strategy whose reference is the policy plus `reference_shift`."""

    def make(
        stage: str,
        reward_source: Any = None,
        by_adapters: bool = False,
        reference_shift: float = 0.0,
        **config: Any,
    ) -> RLHFStrategy:
        values = {
            "prompts": 4, "group": 3, "max_new_tokens": 8, "epochs": 2, "minibatches": 2, **config
        }  # fmt: skip
        reference, critic = None, None
        if not by_adapters:
            reference = copy.deepcopy(policy).requires_grad_(False).eval()
            shifted(reference, 4, reference_shift)
        if stage == "ppo":
            critic = RewardModel.from_transformer(policy)
            generator = torch.Generator().manual_seed(3)
            nn.init.normal_(critic.score.weight, std=0.1, generator=generator)
        return RLHFStrategy(
            policy=policy,
            tokenizer=tokenizer,
            prompts=load_prompts([prompts_file], tokenizer, 64).train,
            reward_source=reward_source or FunctionReward(length_reward, "length"),
            config=RolloutConfig.parse(values),
            layout=BatchLayout(values["prompts"], 64, 2, tokenizer.pad_id, seed=0),
            parallel=CPU,
            compute=Compute(),
            reference=reference,
            critic=critic,
        )

    return make
