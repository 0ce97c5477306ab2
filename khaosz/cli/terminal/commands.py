"""The lines that begin with /."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.cli.terminal.conversation import Conversation, Partner, Settings, load, save
from khaosz.errors import KhaoszError

HELP = '''\
/help               this list                            这份说明
/docs BASE          answer from its documents; off       根据文档回答；/docs off 关闭
/model NAME         another model; alone: which there are    换模型；不写名字则列出
/system TEXT        set the system message, restart      设定系统提示并重新开始
/set NAME VALUE     temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed
/retry              answer the last message again        重新回答上一句
/reset              forget the conversation              忘掉对话，重新开始
/save FILE          write the conversation as JSON       把对话存成 JSON
/load FILE          go on with one that was saved        接着存下的对话谈
/exit               leave (also Ctrl-D)                  退出（也可按 Ctrl-D）

"""..."""           a message of several lines           多行消息
...\\                goes on in the next line             行末反斜杠：下一行继续'''
COMMANDS = tuple(line.split()[0] for line in HELP.splitlines() if line.startswith("/"))

_SETTABLE = {field.name: field.type for field in fields(Settings)}


def is_command(text: str) -> bool:
    """A pasted path or program may begin with / too; one line of it is taken for a command."""
    return text.startswith("/") and ("\n" not in text or text.split()[0] in COMMANDS)


def run(
    line: str,
    conversation: Conversation,
    partner: Partner,
    console: Console,
    answer: Callable[[Conversation, str], None],
) -> bool:
    """Carry one out; False when the user leaves. Raises `KhaoszError`."""
    verb, _, rest = line.partition(" ") if " " in line else line.partition("\n")
    rest = rest.strip()
    match verb:
        case "/exit" | "/quit":
            return False
        case "/help":
            _say(console, HELP)
        case "/reset":
            conversation.turns.clear()
        case "/system":
            conversation.system = rest or None
            conversation.turns.clear()
        case "/retry":
            if len(conversation.turns) < 2:
                _say(console, "nothing to answer again")
            else:
                earlier, last = conversation.turns[:-2], conversation.turns[-2]
                again = replace(conversation, turns=earlier)
                answer(again, last["content"])
                conversation.turns = again.turns
        case "/set":
            _set(conversation, partner, rest, console)
        case "/docs":
            _docs(conversation, partner, rest, console)
        case "/model":
            _model(partner, rest, console)
        case "/save":
            _save(conversation, rest, console)
        case "/load":
            _load(conversation, rest, console)
        case _:
            _say(console, f"unknown command {verb}; /help lists them")
    return True


def _docs(conversation: Conversation, partner: Partner, rest: str, console: Console) -> None:
    if rest == "off":
        conversation.documents = None
    elif rest:
        partner.open_base(rest)
        conversation.documents = rest
    on = conversation.documents
    _say(console, f"answers come from {on}" if on else "answers come from no documents")
    if not rest:
        there = [f"  {name}" for name in partner.bases() if name != on]
        _say(console, "\n".join(["/docs BASE takes:", *there]) if there else "/docs BASE | off")


def _model(partner: Partner, rest: str, console: Console) -> None:
    if rest:
        partner.choose(rest)
        _say(console, f"{partner.name}  {partner.about}")
        return
    names = partner.models()
    listed = names if partner.name in names else [partner.name, *names]
    for name in listed:
        _say(console, f"{'*' if name == partner.name else ' '} {name}")


def _set(conversation: Conversation, partner: Partner, rest: str, console: Console) -> None:
    name, _, value = rest.partition(" ")
    if name not in _SETTABLE:
        now = ", ".join(f"{key} {getattr(conversation.settings, key)}" for key in _SETTABLE)
        _say(console, f"settings: {now}")
        return
    try:
        number: Any = float(value) if _SETTABLE[name] == "float" else int(value)
    except ValueError:
        _say(console, f"{name} takes a number, not '{value}'")
        return
    settings = replace(conversation.settings, **{name: number})
    partner.check(settings)
    conversation.settings = settings


def _save(conversation: Conversation, rest: str, console: Console) -> None:
    if not rest:
        _say(console, "/save FILE")
        return
    try:
        save(conversation, Path(rest).expanduser())
        _say(console, f"saved {rest}")
    except OSError as error:
        raise KhaoszError(f"could not write {rest}: {error.strerror}") from None


def _load(conversation: Conversation, rest: str, console: Console) -> None:
    if not rest:
        _say(console, "/load FILE")
        return
    try:
        conversation.system, conversation.turns = load(Path(rest).expanduser())
    except OSError as error:
        raise KhaoszError(f"could not read {rest}: {error.strerror}") from None
    _say(console, f"{len(conversation.turns) // 2} exchanges; /retry answers the last again")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False)
