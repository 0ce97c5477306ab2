"""Rewards that need no model: `reward_function = "khaosz.rewards:contains_answer"` in a recipe.

A reward function takes the prompt's messages, the answer's text and the record's other keys, and
returns a number. An answer with a reward of NaN is left out of the update. Your own functions go in
a file of yours: `reward_function = "my_rewards.py:name"`.
"""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def contains_answer(messages: list[dict[str, Any]], answer: str, extra: dict[str, Any]) -> float:
    """1 if the text contains the record's `answer`, else 0; less 0.002 for every further character,
    so that long answers are not rewarded for containing everything."""
    expected = str(extra["answer"])
    return float(expected in answer) - 0.002 * max(0, len(answer) - len(expected))


def last_number(messages: list[dict[str, Any]], answer: str, extra: dict[str, Any]) -> float:
    """1 if the last number in the text equals the record's `answer`, else 0: for sums with their
    working shown (as graded in GSM8K, Cobbe et al. 2021, arXiv:2110.14168)."""
    numbers = _NUMBER.findall(answer.replace(",", ""))
    return float(bool(numbers) and float(numbers[-1]) == float(extra["answer"]))


def brevity(messages: list[dict[str, Any]], answer: str, extra: dict[str, Any]) -> float:
    """1 for an answer of at most 40 characters, falling to 0 at 200; 0 for an empty answer."""
    length = len(answer.strip())
    return 0.0 if not length else min(1.0, max(0.0, (200 - length) / 160))
