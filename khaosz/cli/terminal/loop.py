"""The loop of `khaosz chat`: read a message, stream the answer, print it."""

from __future__ import annotations

import sys
from contextlib import closing

from rich.console import Console
from rich.markup import escape

from khaosz.cli.output import open_console
from khaosz.cli.terminal.commands import COMMANDS, is_command, run_command
from khaosz.cli.terminal.conversation import (
    NO_CITATION,
    NOT_ASKED,
    NOTHING_FOUND,
    ChatBackend,
    Conversation,
    Finished,
    Truncated,
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
    answer_text, in_reasoning = "", False
    finished = Finished("interrupted")
    with closing(backend.answer(conversation, message)) as events:
        try:
            for event in events:
                match event:
                    case Truncated(count):
                        turns = turns[2 * count :]
                        what = "exchange is" if count == 1 else f"{count} exchanges are"
                        console.print(f"[dim](context full: the oldest {what} dropped)[/dim]")
                    case Part(kind, text):
                        if in_reasoning and kind == "content":
                            console.print("\n")
                        in_reasoning = kind == "reasoning"
                        answer_text += "" if in_reasoning else text
                        style = "dim" if in_reasoning else None
                        _print_verbatim(console, text, end="", style=style)
                    case Finished():
                        finished = event
        except KeyboardInterrupt:
            pass
    if finished.reason != "stop":
        console.print(f" [dim]\\[{escape(finished.reason or 'incomplete')}][/dim]", end="")
    console.print()
    _print_sources(console, finished)
    conversation.turns = [*turns, {"role": "assistant", "content": answer_text}]


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
