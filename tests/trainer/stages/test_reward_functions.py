"""Reward functions: what they return, and the names that recipes and guides use."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import khaosz.rewards
from khaosz.data.batches.sampler import answer_seed
from khaosz.data.records.preference import Prompt
from khaosz.data.records.turns import Message
from khaosz.errors import ConfigError, TrainingError
from khaosz.inference.sampling import SamplingParams
from khaosz.trainer.stages.reward_sources import Answer, FunctionReward, load_function

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


PROMPT: list[Message] = [{"role": "user", "content": "1+1?"}]


def score(function: Any, texts: Sequence[str] = ("yes", "no"), **extra: Any) -> list[float]:
    prompt = Prompt(PROMPT, extra)
    answers = [Answer(prompt, (5, 7), text, True) for text in texts]
    return FunctionReward(function, "mine.py:f")(answers)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (1, 1.0), (0.5, 0.5), (True, 1.0), (np.float32(0.5), 0.5), (np.int64(3), 3.0),
        (np.bool_(True), 1.0), (np.array([2.0]), 2.0), (torch.tensor(0.25), 0.25),
        (torch.tensor([[4]]), 4.0), (torch.ones(1, requires_grad=True), 1.0),
        (Fraction(1, 4), 0.25), (Decimal("0.5"), 0.5), (1e15, 1e15),
        (math.nan, None), (math.inf, None), (-math.inf, None), (np.float64("nan"), None),
    ],
    ids=repr,
)  # fmt: skip
def test_numbers_of_all_kinds_are_rewards(returned: Any, expected: float | None) -> None:
    (actual, _) = score(lambda *_: returned)
    assert math.isnan(actual) if expected is None else actual == expected


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"returned None (NoneType) for 'yes', not one number"),
        ("0.5", r"returned '0.5' (str) for 'yes', not one number"),
        ([1.0, 2.0], r"returned [1.0, 2.0] (list) for 'yes', not one number"),
        ({"reward": 1}, "(dict)"),
        (1j, "(complex)"),
        (np.array([1.0, 2.0]), "(ndarray)"),
        (torch.zeros(2), "(Tensor)"),
        (torch.zeros(0), "(Tensor)"),
        (1e39, "returned 1e+39 for 'yes', beyond +-1e+15"),
        (-2e15, "returned -2e+15 for 'yes'"),
        (10**400, "beyond"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_a_number_ends_the_run(returned: Any, message: str) -> None:
    with pytest.raises(TrainingError) as error:
        score(lambda *_: returned)
    text = str(error.value)
    assert text.startswith("reward_function mine.py:f ") and message in text
    assert text.endswith("an answer to '1+1?'") and "\n" not in text


def test_coroutine_is_not_a_number() -> None:
    async def later() -> float:
        return 1.0

    with pytest.raises(TrainingError, match=r"\(coroutine\)"):
        score(lambda *_: later())


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), SystemExit(3), RecursionError(), KeyError("x")]
)
def test_exception_of_a_function_is_one_line(error: BaseException) -> None:
    def broken(*_: Any) -> float:
        raise error

    with pytest.raises(
        TrainingError, match=f"mine.py:f failed on 'yes': {type(error).__name__}"
    ) as e:
        score(broken)
    assert "\n" not in str(e.value) and "1+1?" in str(e.value)


def test_every_call_has_its_own_messages_and_keys() -> None:
    seen = []

    def writes(messages: list[Message], answer: str, extra: dict[str, Any]) -> float:
        seen.append((len(messages), messages[0]["content"], list(extra["tags"]), "n" in extra))
        messages.append({"role": "assistant", "content": answer})
        messages[0]["content"] = answer
        extra["tags"].append(answer)
        extra["n"] = 1
        return 0.0

    score(writes, ["a", "b", "c"], tags=["t"])
    assert seen == [(1, "1+1?", ["t"], False)] * 3
    assert PROMPT == [{"role": "user", "content": "1+1?"}]


def test_function_changes_nothing_of_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def untidy(*_: Any) -> float:
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        os.chdir(tmp_path)
        print("hello")
        return 1.0

    before = torch.get_rng_state(), torch.get_num_threads(), os.getcwd()
    score(untidy)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), os.getcwd()) == before[1:]
    assert capsys.readouterr() == ("", "hello\nhello\n")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(answer): return 1.0", "does not take (messages, answer, extra)"),
        ("def f(a, b, c, d): return 1.0", "does not take"),
        ("def f(a, b, c, *, key): return 1.0", "does not take"),
        ("async def f(messages, answer, extra): return 1.0", "is an async function"),
        ("def f(messages, answer, extra): yield 1.0", "is a generator"),
        (
            "class C:\n async def __call__(self, a, b, c): return 1.0\nf = C()",
            "is an async function",
        ),
        ("f = 3", "is not a function"),
        ("def g(messages, answer, extra): return 1.0", "has no 'f'"),
        ("import gone_module", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(
    source: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ConfigError) as error:
        load_function(f"{path}:f")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_module_of_a_function_runs_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    count = tmp_path / "count"
    path.write_text(
        f"with open({str(count)!r}, 'a') as file: file.write('x')\n"
        "def f(messages, answer, extra, *more): return 1\n"
    )
    assert load_function(f"{path}:f") is load_function(f"{path}:f")
    assert count.read_text() == "x"


@pytest.mark.parametrize("seed", [0, 8_388_607, 8_388_608, 2**63 - 1])
def test_seeds_of_answers(seed: int) -> None:
    seeds = [answer_seed(seed, n) for n in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(SamplingParams(seed=one).seed == one for one in seeds)
    assert not set(seeds) & {answer_seed(seed - 1, n) for n in range(1000)}
