"""Reward functions: what they return, and the names that recipes and guides use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import khaosz.rewards
from khaosz.trainer.stages.reward_sources import load_function

ROOT = Path(__file__).parents[3]
NAMED = re.compile(r"\bkhaosz(?:\.\w+)*:[A-Za-z_]\w*")


def named_functions() -> list[str]:
    """Every `khaosz.module:name` of the recipes and the documentation."""
    files = [*(ROOT / "recipes").glob("*.toml"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted({name for file in files for name in NAMED.findall(file.read_text("utf-8"))})


def test_recipes_name_reward_functions() -> None:
    assert {"khaosz.rewards:contains_answer", "khaosz.rewards:brevity"} <= set(named_functions())


@pytest.mark.parametrize("name", named_functions())
def test_named_function_can_be_imported(name: str) -> None:
    assert callable(load_function(name))


@pytest.mark.parametrize("name", ["brevity", "contains_answer", "last_number"])
def test_every_reward_function_is_in_khaosz_rewards(name: str) -> None:
    assert load_function(f"khaosz.rewards:{name}") is getattr(khaosz.rewards, name)


def test_rewards() -> None:
    extra = {"answer": "42"}
    assert khaosz.rewards.contains_answer([], "42", extra) == 1
    assert khaosz.rewards.contains_answer([], "so 42", extra) == pytest.approx(1 - 3 * 0.002)
    assert khaosz.rewards.last_number([], "6 x 7 = 42", extra) == 1
    assert khaosz.rewards.last_number([], "42, not 41", extra) == 0
    assert khaosz.rewards.last_number([], "no number", extra) == 0
    assert khaosz.rewards.brevity([], "short", {}) == 1
    assert khaosz.rewards.brevity([], "x" * 120, {}) == pytest.approx(0.5)
    assert khaosz.rewards.brevity([], " ", {}) == 0
