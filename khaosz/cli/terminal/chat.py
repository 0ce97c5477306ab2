"""The conversation: read, answer, show."""

from __future__ import annotations

from contextlib import closing

from rich.console import Console
from rich.markup import escape

from khaosz.cli.terminal.commands import COMMANDS, is_command, run
from khaosz.cli.terminal.conversation import Conversation, Ended, Forgotten, Part, Partner, Source
from khaosz.cli.terminal.lines import open_reader
from khaosz.errors import KhaoszError

# What a terminal would obey: a model or a document may hold anything.
_CONTROLS = dict.fromkeys({*range(32), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


def converse(partner: Partner, conversation: Conversation) -> None:
    """Read messages from the terminal until the user leaves."""
    # No `:smile:` codes: what the model says is shown as it is.
    console = Console(highlight=False, emoji=False)
    console.print(f"[bold]{escape(partner.name)}[/bold]  {escape(partner.about)}, ", end="")
    console.print("/help for commands")
    if conversation.documents is not None:
        console.print(f"answers come from {conversation.documents}", markup=False)
    read = open_reader(COMMANDS)
    while True:
        try:
            text = read()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("  (Ctrl-D or /exit leaves)")
            continue
        except UnicodeDecodeError as error:
            console.print(f"[red]not understood: these bytes are not {error.encoding}[/red]")
            continue
        if not text:
            continue
        try:
            if not say(text, conversation, partner, console):
                return
        except KhaoszError as error:
            hint = f" ({error.hint})" if error.hint else ""
            console.print(f"[red]{escape(_harmless(str(error)))}[/red]{escape(_harmless(hint))}")
        except KeyboardInterrupt:  # before an answer began, or amid a command
            console.print("[dim](interrupted)[/dim]")


def say(text: str, conversation: Conversation, partner: Partner, console: Console) -> bool:
    """One message or command; False when the user leaves. Raises `KhaoszError`."""

    def answered(about: Conversation, message: str) -> None:
        answer(about, message, partner, console)

    if is_command(text):
        return run(text, conversation, partner, console, answered)
    answered(conversation, text)
    return True


def answer(conversation: Conversation, message: str, partner: Partner, console: Console) -> None:
    """Stream one answer; Ctrl-C stops it, keeping what has been said. A message that cannot be
    answered leaves the conversation as it was."""
    turns = conversation.asking(message)
    said, thinking = "", False
    ended = Ended("interrupted")
    with closing(partner.answer(conversation, message)) as events:
        try:
            for event in events:
                match event:
                    case Forgotten(count):
                        turns = turns[2 * count :]
                        console.print(
                            f"[dim](context full: the oldest {count} exchanges are forgotten)[/dim]"
                        )
                    case Part(text, thought):
                        if thinking and not thought:
                            console.print("\n")
                        thinking = thought
                        said += "" if thought else text
                        _show(console, text, thought)
                    case Ended():
                        ended = event
        except KeyboardInterrupt:
            pass
    if ended.reason != "stop":
        console.print(f" [dim]\\[{escape(ended.reason or 'broken off')}][/dim]", end="")
    console.print()
    _list(console, ended)
    conversation.turns = [*turns, {"role": "assistant", "content": said}]


def _show(console: Console, text: str, thought: bool) -> None:
    style = "dim" if thought else None
    console.print(_harmless(text), end="", style=style, markup=False, soft_wrap=True)


def _list(console: Console, ended: Ended) -> None:
    if ended.sources and not ended.cited:
        console.print("[dim]The answer names no source. Passages it was given:[/dim]")
    for source in ended.sources:
        console.print(_place(source), style="dim", markup=False, soft_wrap=True)


def _place(source: Source) -> str:
    page = f", p. {source.page}" if source.page else ""
    return _harmless(f"[{source.number}] {source.doc}{page}  {source.start:,}-{source.end:,}")


def _harmless(text: str) -> str:
    return text.translate(_CONTROLS)
