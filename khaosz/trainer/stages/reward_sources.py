"""Rewards of answers: from a reward model or a Python function."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from khaosz.data.batches.sequences import TokenSequence
from khaosz.data.records.preference import Prompt
from khaosz.data.records.turns import Message
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.errors import ConfigError, TrainingError, did_you_mean, one_line, quoted
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


# The largest reward: fp32 holds its square, which GRPO's deviation and PPO's value loss compute.
MAX_REWARD = 1e15


class FunctionReward:
    """A Python function of every answer."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function, self.name = function, f"reward_function {name}"

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """One reward per answer; NaN where the function returns NaN or infinity.

        Each call gets its own copy of the messages and the record's other keys, and PyTorch's and
        the process's settings are afterwards as they were before. Raises `TrainingError` when the
        function raises or returns anything but a number within `MAX_REWARD`: it is the user's
        code, and any substitute reward would be learned.
        """
        with _unchanged_process():
            return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float:
        prompt = answer.prompt
        try:
            returned = self.function(
                copy.deepcopy(prompt.prompt), answer.text, copy.deepcopy(prompt.extra)
            )
        except (Exception, SystemExit) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise self._failed(answer, f"failed on {quoted(answer.text)}: {reason}") from error
        score = _number(returned)
        if score is None:
            kind = type(returned).__name__
            if isinstance(returned, Coroutine):
                returned.close()  # it never ran, which Python would warn of
            what = f"returned {quoted(returned)} ({kind}) for {quoted(answer.text)}, not one number"
            raise self._failed(answer, what)
        if not math.isfinite(score):
            return math.nan  # left out of the update
        if abs(score) > MAX_REWARD:
            what = f"returned {score:g} for {quoted(answer.text)}, beyond +-{MAX_REWARD:g}"
            raise self._failed(answer, what)
        return score

    def _failed(self, answer: Answer, what: str) -> TrainingError:
        question = quoted(str(answer.prompt.prompt[-1]["content"]))
        return TrainingError(
            f"{self.name} {what}, an answer to {question}",
            hint="checkpoints that were written are intact; correct the function and --resume",
        )


def _number(returned: Any) -> float | None:
    """A number or bool of Python, numpy or PyTorch, or None for anything else."""
    if isinstance(returned, torch.Tensor | np.ndarray):
        if math.prod(returned.shape) != 1:
            return None
        returned = returned.item()
    elif isinstance(returned, np.generic):
        returned = returned.item()
    try:
        return float(returned) if isinstance(returned, numbers.Real | Decimal) else None
    except OverflowError:  # an integer of 400 digits
        return sys.float_info.max if returned > 0 else -sys.float_info.max


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Undo what the user's code changes in PyTorch's global state and in the process. What it
    prints goes to stderr: stdout has the command's result."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    dtype, grad, folder = torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        torch.set_rng_state(state)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if os.getcwd() != folder:
            os.chdir(folder)


class ModelReward:
    """A reward model, applied to the last token of prompt and answer."""

    name = "reward_model"

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
    """The function that `module:name` or `path/to/file.py:name` names. Raises `ConfigError`, also
    for a function that can't be called with the three arguments of a reward function."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ConfigError(
            f"reward_function='{name}' does not name a function",
            hint="module:name or file.py:name",
        )
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(f"reward_function: {place} can't be loaded: file not found")
    try:
        with _unchanged_process():
            if path.suffix == ".py":
                module = _module_at(path.resolve(), path.stat().st_mtime_ns)
            else:
                module = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ConfigError(f"reward_function: {place} can't be loaded: {reason}") from error
    function = getattr(module, attribute, None)
    if function is None:
        known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        functions = f"its functions: {', '.join(known)}" if known else "it has no functions"
        hint = did_you_mean(attribute, known, functions)
        raise ConfigError(f"reward_function: {place} has no '{attribute}'", hint=hint)
    if not callable(function):
        raise ConfigError(f"reward_function: {name} is not a function")
    _check_signature(function, name)
    return function


@lru_cache(maxsize=8)
def _module_at(path: Path, changed: int) -> ModuleType:
    """The module in a file. It runs once until it is `changed`: it may load a model."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_signature(function: Callable[..., Any], name: str) -> None:
    expected = "def NAME(messages, answer, extra): return a number"
    called = type(function).__call__  # of an object with that method
    kinds: dict[str, Callable[[Any], bool]] = {
        "an async function": inspect.iscoroutinefunction,
        "a generator": inspect.isgeneratorfunction,
        "an async generator": inspect.isasyncgenfunction,
    }
    for kind, holds in kinds.items():
        if holds(function) or holds(called):
            raise ConfigError(f"reward_function: {name} is {kind}", hint=expected)
    if inspect.isclass(function):
        raise ConfigError(f"reward_function: {name} is a class", hint=expected)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind([], "", {})
    except TypeError as error:
        raise ConfigError(
            f"reward_function: {name}{signature} does not take (messages, answer, extra): {error}",
            hint=expected,
        ) from None


def check_same_tokenizer(policy: Tokenizer, other: Tokenizer, path: Path) -> None:
    """Raises `ConfigError` if the model at `path` does not read the policy's token ids."""
    if policy.fingerprint != other.fingerprint:
        raise ConfigError(
            f"{path} has another tokenizer than the policy",
            hint="use a model that was trained from the policy's start (init_from=)",
        )
