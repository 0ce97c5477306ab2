"""Limits of the stages on the numbers of a recipe: checked before work, and again by the stage when
its tokenizer and model are there."""

from __future__ import annotations

from pathlib import Path

from khaosz.config import ModelConfig, TrainConfig
from khaosz.errors import ConfigError

PREFERENCE_PAIRS = 16  # per step, where the recipe has no batch_pairs
TEXT_PAIRS = 64


def check_pairs_per_step(pairs: int, world: int) -> None:
    """Raises `ConfigError` if a process of a preference stage would have no pair."""
    if pairs < world:
        raise ConfigError(
            f"batch_pairs={pairs} is fewer than the {world} processes",
            hint=f"batch_pairs={world} or more",
        )


def check_texts_per_step(pairs: int, world: int) -> None:
    """Raises `ConfigError` if a query would have no negative, or a process no query."""
    if pairs < max(2, world):
        raise ConfigError(
            f"batch_pairs={pairs}: a query needs the passage of another one as a negative, and"
            f" each of {world} processes needs a query",
            hint=f"batch_pairs={TEXT_PAIRS}, or more",
        )


def embedded_length(config: TrainConfig, window: int) -> int:
    """The most tokens of a text that is embedded. Raises `ConfigError`."""
    longest = config.embed.max_length or window
    if longest > window:
        raise ConfigError(
            f"embed.max_length={longest} is longer than the window of {window}",
            hint=f"window={longest}, if the model's context is as long",
        )
    return longest


def check_room(config: TrainConfig, window: int, world: int) -> None:
    """Raises `ConfigError` if a rollout has no room for a prompt, or a process no prompt."""
    rollout = config.rollout
    if rollout.max_new_tokens >= window:
        raise ConfigError(
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt"
            f" in a window of {window}"
        )
    if rollout.prompts < world:
        raise ConfigError(f"rollout.prompts={rollout.prompts}, but {world} processes")


def check_context(shape: ModelConfig, path: Path, window: int) -> None:
    """Raises `ConfigError` if the reward model at `path` reads less than a window."""
    if shape.max_position_embeddings < window:
        raise ConfigError(
            f"the reward model {path} reads {shape.max_position_embeddings} positions,"
            f" the window is {window}"
        )
