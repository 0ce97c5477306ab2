"""The error tree matches its docstring; the command prints an error as one line and a hint."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from khaosz import errors
from khaosz.errors import ConfigError, KhaoszError, did_you_mean, nearest

_TREE_LINE = re.compile(r"^(?P<indent>[ │]*)[├└]── (?P<name>\w+Error)\b", re.MULTILINE)


def test_tree_matches_docstring() -> None:
    assert errors.__doc__ is not None
    parents = {"KhaoszError": "Exception"}
    trail = ["KhaoszError"]
    for match in _TREE_LINE.finditer(errors.__doc__):
        depth = (len(match["indent"]) - 4) // 4 + 1
        parents[match["name"]] = trail[depth - 1]
        trail[depth:] = [match["name"]]
    classes = {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception)
    }
    assert {name: kind.__bases__[0].__name__ for name, kind in classes.items()} == parents


def test_error_has_message_and_hint() -> None:
    error = ConfigError("a.toml: unknown key", hint="write lr")
    assert isinstance(error, KhaoszError)
    assert (str(error), error.hint) == ("a.toml: unknown key", "write lr")
    assert ConfigError("x").hint is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lerning_rate", "learning_rate"), ("wdith", "width"), ("zzz", None), ("", None)],
)
def test_nearest_name(name: str, expected: str | None) -> None:
    assert nearest(name, iter(["learning_rate", "width", "depth"])) == expected


def test_nearest_of_no_names_is_none() -> None:
    assert nearest("x", []) is None


def test_did_you_mean() -> None:
    assert did_you_mean("wdith", ["width", "depth"], "-") == "did you mean 'width'?"
    assert did_you_mean("zzz", ["width", "depth"], "known: width") == "known: width"


def test_command_prints_message_and_hint_and_exits_with_1() -> None:
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
    assert message == "error: data set 'nothing' not found" and hint.startswith("hint: ")
