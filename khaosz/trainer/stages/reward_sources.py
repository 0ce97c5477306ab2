"""What an answer is worth: a reward model's opinion, or a Python function's."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from khaosz.data.batches.sequences import TokenSequence, group_into_batches, pack_sequences
from khaosz.data.records.chat import Message
from khaosz.data.records.preference import Prompt
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import ConfigError, TrainingError
from khaosz.model import RewardModel
from khaosz.trainer.stages.dpo import sequence_rewards
from khaosz.trainer.strategy import Compute

RewardFunction = Callable[[list[Message], str, dict[str, Any]], float]
"""(messages of the prompt, the answer's text, the record's other keys) -> reward."""


@dataclass(frozen=True)
class Answer:
    """One sampled answer: what a judge sees of it."""

    prompt: Prompt
    ids: tuple[int, ...]  # the token that ends the turn included, if it came
    text: str
    finished: bool  # False: the length limit cut it

    @property
    def sequence(self) -> TokenSequence:
        """Prompt and answer, the answer scored."""
        assert self.prompt.prompt_ids is not None
        asked = self.prompt.prompt_ids.tolist()
        return TokenSequence([*asked, *self.ids], len(asked))


class FunctionJudge:
    """Asks a Python function about every answer."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """One reward per answer; NaN where the function gave no finite number.

        Raises `TrainingError` when the function raises: it is the user's code, and a reward made
        up in its place would be learned.
        """
        scores = []
        for answer in answers:
            asked = answer.prompt
            try:
                score = float(self.function(asked.prompt, answer.text, asked.extra))
            except Exception as error:
                raise TrainingError(
                    f"reward_function {self.name} failed on {answer.text[:60]!r}:"
                    f" {type(error).__name__}: {error}",
                    hint="the last checkpoint is intact; mend the function and --resume",
                ) from error
            scores.append(score if math.isfinite(score) else math.nan)
        return scores


class ModelJudge:
    """Asks a reward model, which reads prompt and answer to the last token of it."""

    def __init__(
        self, model: RewardModel, compute: Compute, window: int, rows: int, pad_id: int
    ) -> None:
        self.model, self.compute = model.eval().requires_grad_(False), compute
        self.window, self.rows, self.pad_id = window, rows, pad_id

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        device = self.model.score.weight.device
        texts = [answer.sequence for answer in answers]
        lengths = [len(text.ids) for text in texts]
        scores = [math.nan] * len(texts)
        alone = [[i] for i in range(len(texts))]
        for members in group_into_batches(alone, lengths, self.window, self.rows):
            batch = pack_sequences([texts[i] for i in members], self.window, self.pad_id)
            rewards = sequence_rewards(self.model, batch.to(device), self.compute).tolist()
            for i, reward in zip(members, rewards, strict=True):
                scores[i] = reward if math.isfinite(reward) else math.nan
        return scores


Judge = FunctionJudge | ModelJudge


def load_function(name: str) -> RewardFunction:
    """The function that `module:name` or `path/to/file.py:name` names. Raises `ConfigError`."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ConfigError(
            f"reward_function='{name}' names no function", hint="module:name or file.py:name"
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


def check_same_tokenizer(own: Tokenizer, other: Tokenizer, path: Path) -> None:
    """A reward model reads the policy's ids: raises `ConfigError` if they mean something else."""
    if own.fingerprint != other.fingerprint:
        raise ConfigError(
            f"the reward model {path} has another tokenizer than the policy",
            hint="train one from the same model: stage=rm, init_from= the policy's start",
        )
