"""`khaosz chat`: a conversation in the terminal, streamed, with history and a few commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from khaosz.errors import KhaoszError, ModelError
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.interop import WEIGHTS, is_embedder

HELP = """\
/help               this list                        这份说明
/reset              forget the conversation          忘掉对话，重新开始
/retry              answer the last message again    重新回答上一句
/system TEXT        set the system message, restart  设定系统提示并重新开始
/set NAME VALUE     temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed
/save FILE          write the conversation as JSON   把对话存成 JSON
/exit               leave (also Ctrl-D)              退出（也可按 Ctrl-D）"""

_SETTABLE: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "max_tokens": int,
    "seed": int,
}


@dataclass
class Conversation:
    """The state of a chat: messages so far and how answers are sampled."""

    params: SamplingParams
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns


def newest_model(runs: Path) -> Path:
    """The model directory written last under `runs`; raises `ModelError` if there is none."""
    found = [
        path.parent
        for pattern in ("last/config.json", "*/last/config.json", "*/*/last/config.json")
        for path in runs.glob(pattern)
        if (path.parent / WEIGHTS).exists() and not is_embedder(path.parent)
    ]
    if not found:
        raise ModelError(
            f"no model was trained here (nothing under {runs}/)",
            hint="run `khaosz demo`, or `khaosz pull smollm2` for a small open model (English)",
        )
    return max(found, key=lambda path: (path / WEIGHTS).stat().st_mtime)


def converse(
    generator: Generator, params: SamplingParams, name: str, system: str | None = None
) -> None:
    """Read messages from the terminal until the user leaves."""
    # No `:smile:` codes: what the model says is shown as it is.
    console = Console(highlight=False, emoji=False)
    about = f"context {generator.context} tokens, /help for commands"
    console.print(f"[bold]{escape(name)}[/bold]  {about}")
    conversation = Conversation(params, system)
    while True:
        try:
            line = console.input("[bold cyan]>[/bold cyan] ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("  (Ctrl-D or /exit leaves)")
            continue
        except UnicodeDecodeError as error:
            console.print(f"[red]not understood: these bytes are not {error.encoding}[/red]")
            continue
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not command(conversation, line, console, generator):
                    return
            else:
                answer(conversation, line, console, generator)
        except KhaoszError as error:
            hint = f" ({error.hint})" if error.hint else ""
            console.print(f"[red]{escape(str(error))}[/red]{escape(hint)}")


def answer(
    conversation: Conversation, message: str, console: Console, generator: Generator
) -> None:
    """Stream one answer; Ctrl-C stops it, keeping what has been said."""
    # A message that cannot be answered leaves the conversation as it was.
    turns, ids = _fitting(conversation, message, generator)
    pieces = generator.stream(ids, conversation.params)
    dropped = (len(conversation.turns) + 1 - len(turns)) // 2
    if dropped:
        console.print(f"[dim](context full: the oldest {dropped} exchanges are forgotten)[/dim]")
    said, reason = "", None
    try:
        for piece in pieces:
            said += piece.text
            reason = piece.finish_reason
            console.print(piece.text, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        reason = "interrupted"
    if reason != "stop":
        console.print(f" [dim]\\[{reason}][/dim]", end="")
    console.print()
    conversation.turns = [*turns, {"role": "assistant", "content": said}]


def command(conversation: Conversation, line: str, console: Console, generator: Generator) -> bool:
    """Carry out a /command; False when the user leaves."""
    verb, _, rest = line.partition(" ")
    rest = rest.strip()
    match verb:
        case "/exit" | "/quit":
            return False
        case "/help":
            console.print(HELP, markup=False)
        case "/reset":
            conversation.turns.clear()
        case "/system":
            conversation.system = rest or None
            conversation.turns.clear()
        case "/retry":
            if len(conversation.turns) < 2:
                console.print("nothing to answer again")
            else:
                earlier, last = conversation.turns[:-2], conversation.turns[-2]
                again = replace(conversation, turns=earlier)
                answer(again, last["content"], console, generator)
                conversation.turns = again.turns
        case "/set":
            _set(conversation, rest, console)
        case "/save":
            _save(conversation, rest, console)
        case _:
            console.print(f"unknown command {verb}; /help lists them", markup=False)
    return True


def _fitting(
    conversation: Conversation, message: str, generator: Generator
) -> tuple[list[dict[str, str]], list[int]]:
    """Turns up to and with the new message, and their ids; the oldest exchanges are left out once
    they don't fit."""
    turns = [*conversation.turns, {"role": "user", "content": message}]
    room = min(conversation.params.max_tokens, generator.context // 4)
    while True:
        ids = generator.chat_ids(replace(conversation, turns=turns).messages)
        if len(ids) + room <= generator.context or len(turns) <= 1:
            return turns, ids
        turns = turns[2:]


def _set(conversation: Conversation, rest: str, console: Console) -> None:
    name, _, value = rest.partition(" ")
    if name not in _SETTABLE:
        console.print(f"settings: {', '.join(_SETTABLE)}")
        return
    try:
        conversation.params = replace(conversation.params, **{name: _SETTABLE[name](value)})
    except ValueError:
        console.print(f"{name} takes a number, not '{value}'", markup=False)


def _save(conversation: Conversation, rest: str, console: Console) -> None:
    if not rest:
        console.print("/save FILE")
        return
    try:
        text = json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=2)
        Path(rest).expanduser().write_text(text + "\n", encoding="utf-8")
        console.print(f"saved {rest}", markup=False)
    except OSError as error:
        console.print(f"[red]could not write {escape(rest)}: {error.strerror}[/red]")
