"""Input of the chat, at a real pseudo-terminal and through a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_model import khaosz_serve, model, model_directory

from khaosz.cli.terminal.input import read_lines

if sys.platform == "win32":
    pytest.skip("Windows has no pseudo-terminals", allow_module_level=True)

from pseudo_terminal import PseudoTerminal


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with khaosz_serve(model_directory(tmp_path_factory.mktemp("served") / "saying")) as address:
        yield address


def messages(path: Path) -> list[str]:
    saved = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return [turn["content"] for turn in saved if turn["role"] == "user"]


def read(*lines: str) -> list[str]:
    """The messages that these lines form."""
    rest = iter(lines)

    def line(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    messages_read = []
    while True:
        try:
            messages_read.append(read_lines(line))
        except EOFError:
            return messages_read


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["  a  ", "b"], ["a", "b"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (["C:\\\\", "b"], ["C:\\\\", "b"]),
        (['"""a', "b\\", "", '"quoted" """', "c"], ['a\nb\\\n\n"quoted" ', "c"]),
        (['"""', "  a", "b", '"""', "c"], ["  a\nb", "c"]),
        (['"""a"""', '""""""'], ["a", ""]),
        (['"""', "a"], ["a"]),  # ended by the end of the file
        (["a\\"], ["a"]),
    ],
)
def test_lines_become_messages(lines: list[str], expected: list[str]) -> None:
    assert read(*lines) == expected


@pytest.mark.parametrize("editor", [True, False])
def test_several_lines_at_a_terminal(url: str, tmp_path: Path, editor: bool) -> None:
    """With prompt_toolkit and without."""
    hidden = (
        {} if editor else {"PYTHONPATH": f"{hide_editor(tmp_path)}:{Path(__file__).parents[2]}"}
    )
    with PseudoTerminal("chat", "--url", url, home=tmp_path, **hidden) as terminal:
        for keys in ("你好\\\rb\r", '"""c\rd"""\r', "\x1b[200~/usr p\nq\x1b[201~\r"):
            terminal.send(keys, "ok:1")
            terminal.until(">")
        terminal.send("/save a.json\r", "saved a.json")
        assert terminal.quit() == 0
    assert messages(tmp_path / "a.json") == ["你好\nb", "c\nd", "/usr p\nq"]
    assert (tmp_path / ".khaosz_history").exists() == editor


def hide_editor(tmp_path: Path) -> Path:
    """A folder whose prompt_toolkit can't be messages_read."""
    package = tmp_path / "hidden" / "prompt_toolkit.py"
    package.parent.mkdir()
    package.write_text("raise ModuleNotFoundError('not here', name='prompt_toolkit')\n")
    return package.parent


def test_history_survives_the_session(url: str, tmp_path: Path) -> None:
    for keys in ("你好\\\rb\r", "\x1b[A\x1b[A\x1b[A\r"):  # up: /exit, /save, the message
        with PseudoTerminal("chat", "--url", url, home=tmp_path) as terminal:
            terminal.send(keys, "ok:1")
            terminal.until(">")
            terminal.send("/save a.json\r", "saved a.json")
            assert terminal.quit() == 0
        assert messages(tmp_path / "a.json") == ["你好\nb"]
    assert (tmp_path / ".khaosz_history").stat().st_mode & 0o777 == 0o600


def test_empty_history_variable_disables_the_history(url: str, tmp_path: Path) -> None:
    with PseudoTerminal("chat", "--url", url, home=tmp_path, KHAOSZ_HISTORY="") as terminal:
        terminal.send("hi\r", "ok:1")
        assert terminal.quit() == 0
    assert list(tmp_path.iterdir()) == []


def test_tab_completes_a_command(url: str, tmp_path: Path) -> None:
    with PseudoTerminal("chat", "--url", url, home=tmp_path) as terminal:
        terminal.send("/mod\t\r", "* saying")
        assert terminal.quit() == 0


@pytest.mark.parametrize("remote", [True, False])
def test_ctrl_c_stops_an_answer_and_keeps_its_text(tmp_path: Path, remote: bool) -> None:
    directory = model_directory(tmp_path / "endless", model("on, ", 1 << 17, endless=True))
    options = ["--max-tokens", "100000", "--temperature", "0", "--repetition-penalty", "1"]

    def talk(*where: str) -> None:
        with PseudoTerminal("chat", *where, *options, home=tmp_path) as terminal:
            terminal.send("hi\r", "on, on, ")
            terminal.interrupt()
            terminal.until("[interrupted]")
            terminal.until(">")
            terminal.send("/save a.json\r", "saved a.json")
            terminal.until(">")
            terminal.interrupt()  # while typing: the chat continues
            terminal.until("to quit)")
            assert terminal.quit() == 0
        saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["messages"]
        assert saved[0] == {"role": "user", "content": "hi"}
        assert saved[1]["content"].startswith("on, on, ")

    if remote:
        with khaosz_serve(directory) as url:
            talk("--url", url)
    else:
        talk(str(directory), "--device", "cpu")
