"""The error tree as its docstring draws it, and how the command shows an error."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from khaosz import errors
from khaosz.errors import ConfigError, KhaoszError, nearest

DRAWN = re.compile(r"^(?P<indent>[ │]*)[├└]── (?P<name>\w+Error)\b", re.MULTILINE)


def test_the_tree_is_the_one_drawn() -> None:
    assert errors.__doc__ is not None
    parents = {"KhaoszError": "Exception"}
    trail = ["KhaoszError"]
    for match in DRAWN.finditer(errors.__doc__):
        depth = (len(match["indent"]) - 4) // 4 + 1
        parents[match["name"]] = trail[depth - 1]
        trail[depth:] = [match["name"]]
    classes = {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception)
    }
    assert {name: kind.__bases__[0].__name__ for name, kind in classes.items()} == parents


def test_an_error_is_its_message_and_carries_its_hint() -> None:
    error = ConfigError("a.toml: no such key", hint="write lr")
    assert isinstance(error, KhaoszError)
    assert (str(error), error.hint) == ("a.toml: no such key", "write lr")
    assert ConfigError("x").hint is None


@pytest.mark.parametrize(
    ("name", "found"),
    [("lerning_rate", "learning_rate"), ("wdith", "width"), ("zzz", None), ("", None)],
)
def test_the_nearest_name(name: str, found: str | None) -> None:
    assert nearest(name, iter(["learning_rate", "width", "depth"])) == found


def test_nothing_is_near_nothing() -> None:
    assert nearest("x", []) is None


def test_the_command_prints_one_line_and_a_hint_and_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "khaosz", "data", "get", "nothing"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    message, hint = done.stderr.splitlines()
    assert message == "error: no data set 'nothing'" and hint.startswith("hint: ")
