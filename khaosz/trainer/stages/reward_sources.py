"""Rewards of answers: from a reward model or a Python function."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from khaosz.data.batches.sequences import TokenSequence
from khaosz.data.records.chat import Message
from khaosz.data.records.preference import Prompt
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.errors import ConfigError, TrainingError
from khaosz.interop.huggingface import load_reward_model
from khaosz.model import RewardModel
from khaosz.trainer.open_run import OpenRun
from khaosz.trainer.stages.dpo import sequence_rewards
from khaosz.trainer.stages.limits import check_context
from khaosz.trainer.strategy import BatchLayout, Compute

RewardFunction = Callable[[list[Message], str, dict[str, Any]], float]
"""(messages of the prompt, the answer's text, the record's other keys) -> reward."""


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    prompt: Prompt
    ids: tuple[int, ...]  # with the token that ends the turn, if it was sampled
    text: str
    finished: bool  # False: cut by the length limit

    @property
    def sequence(self) -> TokenSequence:
        """Prompt and answer, the answer scored."""
        assert self.prompt.prompt_ids is not None
        prompt = self.prompt.prompt_ids.tolist()
        return TokenSequence([*prompt, *self.ids], len(prompt))


class FunctionReward:
    """A Python function of every answer."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """One reward per answer; NaN where the function returns no finite number.

        Raises `TrainingError` when the function raises: it is the user's code, and any substitute
        reward would be learned.
        """
        scores = []
        for answer in answers:
            prompt = answer.prompt
            try:
                score = float(self.function(prompt.prompt, answer.text, prompt.extra))
            except Exception as error:
                raise TrainingError(
                    f"reward_function {self.name} failed on {answer.text[:60]!r}:"
                    f" {type(error).__name__}: {error}",
                    hint="the last checkpoint is intact; correct the function and --resume",
                ) from error
            scores.append(score if math.isfinite(score) else math.nan)
        return scores


class ModelReward:
    """A reward model, applied to the last token of prompt and answer."""

    def __init__(self, model: RewardModel, compute: Compute, layout: BatchLayout) -> None:
        self.model, self.compute = model.eval().requires_grad_(False), compute
        self.layout = layout

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        device = self.model.score.weight.device
        scores = [math.nan] * len(answers)
        for members, batch in self.layout.pack([answer.sequence for answer in answers]):
            rewards = sequence_rewards(self.model, batch.to(device), self.compute).tolist()
            for i, reward in zip(members, rewards, strict=True):
                scores[i] = reward if math.isfinite(reward) else math.nan
        return scores


RewardSource = FunctionReward | ModelReward


def open_reward_source(run: OpenRun, compute: Compute, layout: BatchLayout) -> RewardSource:
    """The recipe's reward function or reward model; `layout` is that of its forward pass.
    Raises `ConfigError`, `ModelError`."""
    config, tokenizer = run.config, run.tokenizer
    if config.reward_function is not None:
        return FunctionReward(load_function(config.reward_function), config.reward_function)
    path = config.reward_model
    assert path is not None
    check_same_tokenizer(tokenizer, load_tokenizer(path), path)
    model = load_reward_model(path, device=run.parallel.device)
    run.record_model("reward_model", path, model)
    check_context(model.config, path, run.window)
    return ModelReward(model, compute, layout)


def load_function(name: str) -> RewardFunction:
    """The function that `module:name` or `path/to/file.py:name` names. Raises `ConfigError`."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ConfigError(
            f"reward_function='{name}' does not name a function",
            hint="module:name or file.py:name",
        )
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:
        raise ConfigError(
            f"reward_function: {place} can't be loaded: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise ConfigError(f"reward_function: {place} has no '{attribute}'")
    if not callable(function):
        raise ConfigError(f"reward_function: {name} is not a function")
    return function


def check_same_tokenizer(policy: Tokenizer, other: Tokenizer, path: Path) -> None:
    """Raises `ConfigError` if the model at `path` does not read the policy's token ids."""
    if policy.fingerprint != other.fingerprint:
        raise ConfigError(
            f"{path} has another tokenizer than the policy",
            hint="use a model that was trained from the policy's start (init_from=)",
        )
