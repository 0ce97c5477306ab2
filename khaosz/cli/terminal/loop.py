"""The loop of `khaosz chat`: read a message, stream the answer, print it."""

from __future__ import annotations

import sys
from contextlib import closing
from time import perf_counter

from rich.console import Console
from rich.markup import escape

from khaosz.cli.output import open_console
from khaosz.cli.terminal.commands import COMMANDS, describe_sampling, is_command, run_command
from khaosz.cli.terminal.conversation import (
    NO_CITATION,
    NOT_ASKED,
    NOTHING_FOUND,
    ChatBackend,
    Conversation,
    Finished,
    Thought,
    Truncated,
    Warned,
)
from khaosz.cli.terminal.input import open_reader
from khaosz.errors import KhaoszError
from khaosz.inference.parts import Part

# Control characters: the output of a model and the name of a document may contain any.


def run_chat(backend: ChatBackend, conversation: Conversation) -> None:
    """Read messages from the terminal until the user leaves."""
    # No `:smile:` codes: the output of the model is printed verbatim.
    console = open_console(highlight=False, emoji=False)
    console.print(f"[bold]{escape(backend.name)}[/bold]  {escape(backend.about)}, ", end="")
    console.print("/help for commands")
    console.print(describe_sampling(backend, conversation.settings), style="dim", markup=False)
    if conversation.documents is not None:
        console.print(f"answering from {conversation.documents}", markup=False)
    read = open_reader(COMMANDS)
    while True:
        try:
            text = read()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():  # no one is there to read the hint
                raise
            console.print("  (Ctrl-D or /exit to quit)")
            continue
        except UnicodeDecodeError as error:
            console.print(f"[red]invalid {error.encoding}[/red]")
            continue
        if not text:
            continue
        try:
            if not handle_input(text, conversation, backend, console):
                return
        except KhaoszError as error:
            hint = f" ({error.hint})" if error.hint else ""
            console.print(f"[red]{escape(str(error))}[/red]{escape(hint)}")
        except KeyboardInterrupt:  # before an answer starts, or during a command
            console.print("[dim](interrupted)[/dim]")


def handle_input(
    text: str, conversation: Conversation, backend: ChatBackend, console: Console
) -> bool:
    """Handle a message or command; False on /exit. Raises `KhaoszError`."""
    if is_command(text):
        return run_command(text, conversation, backend, console, answer)
    answer(conversation, text, backend, console)
    return True


def answer(
    conversation: Conversation, message: str, backend: ChatBackend, console: Console
) -> None:
    """Stream one answer. Ctrl-C stops it and keeps the partial answer. On an error the conversation
    is unchanged."""
    turns = conversation.with_message(message)
    answer_text = ""
    thoughts = _Thoughts(console)
    finished = Finished("interrupted")
    with closing(backend.answer(conversation, message)) as events:
        try:
            for event in events:
                match event:
                    case Truncated(count):
                        turns = turns[2 * count :]
                        what = "exchange is" if count == 1 else f"{count} exchanges are"
                        console.print(f"[dim](context full: the oldest {what} dropped)[/dim]")
                    case Warned(language, text) if language not in conversation.warned:
                        conversation.warned.add(language)
                        _print_verbatim(console, f"({text})")
                    case Part("reasoning", text):
                        thoughts.add(text)
                    case Thought(tokens):
                        thoughts.fold(tokens)
                    case Part(_, text):
                        thoughts.fold()
                        answer_text += text
                        _print_verbatim(console, text, end="", style=None)
                    case Finished():
                        finished = event
        except KeyboardInterrupt:
            pass
    thoughts.fold()
    conversation.thoughts = thoughts.text
    if finished.reason != "stop":
        console.print(f" [dim]\\[{escape(finished.reason or 'incomplete')}][/dim]", end="")
    console.print()
    _print_sources(console, finished)
    conversation.turns = [*turns, {"role": "assistant", "content": answer_text}]


class _Thoughts:
    """Thoughts are one dimmed line, which counts seconds on a terminal; /thoughts prints them."""

    def __init__(self, console: Console) -> None:
        self.text = ""
        self._console, self._started = console, 0.0
        self._shown = -1  # seconds

    def add(self, text: str) -> None:
        if not self.text:
            self._started = perf_counter()
        self.text += text
        seconds = int(perf_counter() - self._started)
        if self._console.is_terminal and seconds > self._shown:
            self._shown = seconds
            self._line(f"thinking, {seconds} s", end="\r")

    def fold(self, tokens: int | None = None) -> None:
        """Once, when the thoughts end."""
        if not self._started:
            return
        seconds, self._started = perf_counter() - self._started, 0.0
        counted = "" if tokens is None else f", {tokens:,} tokens"
        self._line(f"thought for {seconds:.0f} s{counted}  (/thoughts shows them)", end="\n")

    def _line(self, text: str, end: str) -> None:
        self._console.print(text, end=end, style="dim", markup=False, highlight=False)


def _print_verbatim(
    console: Console, text: str, style: str | None = "dim", end: str = "\n"
) -> None:
    console.print(text, end=end, style=style, markup=False, soft_wrap=True)


def _print_sources(console: Console, finished: Finished) -> None:
    if not finished.asked:
        note = f"{NOT_ASKED} /anyway asks it." if finished.sources else NOTHING_FOUND
        console.print(note, style="dim", markup=False)
    elif finished.sources and not finished.cited:
        console.print(NO_CITATION, style="dim")
    for source in finished.sources:
        _print_verbatim(console, str(source))
