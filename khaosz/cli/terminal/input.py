"""Read messages of one or more lines.

A message that begins with three quotation marks ends at the next three; a backslash at the end of a
line continues it on the next. On a terminal with prompt_toolkit, pasted text with line breaks is
one message, Alt-Enter breaks a line, Tab completes commands, and the history is stored in a file
that only this user can read. Otherwise plain lines are read.
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
    """Whether the message continues on the next line."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return len(stripped) < 2 * len(QUOTES) or not stripped.endswith(QUOTES)
    return _continues(text)


def message_of(text: str) -> str:
    """The message without the quotation marks around it."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return stripped


def open_reader(commands: Sequence[str]) -> Read:
    """A reader for this terminal, or for a pipe."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ModuleNotFoundError):
            return _editor(commands)
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives `input` line editing
    return lambda: read_lines(input)


def read_lines(line: Callable[[str], str]) -> str:
    """One message; the end of the file ends an unfinished one."""
    text = line(PROMPT)
    while unfinished(text):
        if _continues(text) and not text.strip().startswith(QUOTES):
            text = text[:-1]
        try:
            text += f"\n{line(MORE)}"
        except EOFError:
            break
    return message_of(text)


def history_file() -> Path | None:
    """The path in `KHAOSZ_HISTORY`, by default ~/.khaosz_history; None if it is set but empty."""
    path = os.environ.get(HISTORY)
    if path == "":
        return None
    return Path(path).expanduser() if path else Path.home() / ".khaosz_history"


def _continues(text: str) -> bool:
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
            continues = unfinished(buffer.text)
        elif continues := _continues(before) and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
        if continues:
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    if (path := history_file()) is not None:
        with suppress(OSError):  # home missing or read-only: keep the history in memory
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
            history = FileHistory(str(path))
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,  # `enter` above decides when a message ends
        prompt_continuation=MORE,
        key_bindings=keys,
        history=history,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
    )
    return lambda: message_of(session.prompt())
