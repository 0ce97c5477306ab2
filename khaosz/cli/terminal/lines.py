"""Reading messages: one line, or more.

A message that begins with three quotation marks goes on to the next three; a backslash at the end
of a line goes on to the next. On a terminal, with prompt_toolkit, what is pasted with line breaks
is one message, Alt-Enter breaks a line, Tab completes commands, and earlier messages are kept in a
file that only this user can read. Else lines are read as they come.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

QUOTES = '"""'
PROMPT, MORE = "> ", "… "
HISTORY = "KHAOSZ_HISTORY"

Read = Callable[[], str]  # raises EOFError and KeyboardInterrupt


def unfinished(text: str) -> bool:
    """Whether the message goes on behind a line break."""
    told = text.strip()
    if told.startswith(QUOTES):
        return len(told) < 2 * len(QUOTES) or not told.endswith(QUOTES)
    return _goes_on(text)


def message_of(text: str) -> str:
    """What was typed, without the marks around it."""
    told = text.strip()
    if told.startswith(QUOTES):
        return told.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return told


def open_reader(commands: Sequence[str]) -> Read:
    """For this terminal, or for a pipe."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ModuleNotFoundError):
            return _editor(commands)
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - lets `input` move and correct
    return lambda: read_lines(input)


def read_lines(line: Callable[[str], str]) -> str:
    """One message; the end of the file ends one that was begun."""
    text = line(PROMPT)
    while unfinished(text):
        told = text[:-1] if _goes_on(text) and not text.strip().startswith(QUOTES) else text
        try:
            text = f"{told}\n{line(MORE)}"
        except EOFError:
            text = told
            break
    return message_of(text)


def history_file() -> Path | None:
    """`KHAOSZ_HISTORY`, or a file in the home folder; None where that is set to nothing."""
    chosen = os.environ.get(HISTORY)
    if chosen == "":
        return None
    return Path(chosen).expanduser() if chosen else Path.home() / ".khaosz_history"


def _goes_on(text: str) -> bool:
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _editor(commands: Sequence[str]) -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = buffer.document.text_before_cursor
        if buffer.text.strip().startswith(QUOTES):
            goes_on = unfinished(buffer.text)
        elif goes_on := _goes_on(before) and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
        if goes_on:
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    if (path := history_file()) is not None:
        with suppress(OSError):  # no home, or one that can't be written: nothing is kept
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
            history = FileHistory(str(path))
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,  # Enter is ours
        prompt_continuation=MORE,
        key_bindings=keys,
        history=history,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
    )
    return lambda: message_of(session.prompt())
