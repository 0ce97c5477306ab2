"""The commands of the chat: lines that begin with /."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.cli.terminal.conversation import ChatBackend, Conversation, Settings, load, save
from khaosz.errors import KhaoszError

HELP = '''\
/help               show this list                       显示本说明
/docs BASE          answer from a knowledge base; off    根据知识库回答；/docs off 关闭
/model NAME         switch models; without NAME: list    切换模型；不写名称则列出
/system TEXT        set the system message, restart      设置系统提示并重新开始
/set NAME VALUE     temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed
/retry              answer the last message again        重新回答上一句
/anyway             ask again, though no passage fits    没有相关段落也让模型回答
/reset              clear the conversation               清空对话，重新开始
/save FILE          save the conversation as JSON        将对话保存为 JSON
/load FILE          continue a saved conversation        继续已保存的对话
/exit               quit (also Ctrl-D)                   退出（也可按 Ctrl-D）

"""..."""           a message of several lines           多行消息
...\\                continues on the next line           行末反斜杠：下一行继续'''
COMMANDS = tuple(line.split()[0] for line in HELP.splitlines() if line.startswith("/"))

_SETTABLE = {field.name: field.type for field in fields(Settings)}


def is_command(text: str) -> bool:
    """Pasted text may begin with / as well: several lines are a command only if the first word is
    one."""
    return text.startswith("/") and ("\n" not in text or text.split()[0] in COMMANDS)


def run_command(
    line: str,
    conversation: Conversation,
    backend: ChatBackend,
    console: Console,
    answer: Callable[[Conversation, str, ChatBackend, Console], None],
) -> bool:
    """Run one command; False on /exit. Raises `KhaoszError`."""
    verb, _, argument = line.partition(" ") if " " in line else line.partition("\n")
    argument = argument.strip()
    match verb:
        case "/exit" | "/quit":
            return False
        case "/help":
            _print(console, HELP)
        case "/reset":
            conversation.turns.clear()
        case "/system":
            conversation.system = argument or None
            conversation.turns.clear()
        case "/retry" | "/anyway":
            if len(conversation.turns) < 2:
                _print(console, "nothing to retry")
            else:
                message = conversation.turns[-2]["content"]
                turns, anyway = conversation.turns[:-2], verb == "/anyway"
                retried = replace(conversation, turns=turns, anyway=anyway)
                answer(retried, message, backend, console)
                conversation.turns = retried.turns
        case "/set":
            _set(conversation, backend, argument, console)
        case "/docs":
            _docs(conversation, backend, argument, console)
        case "/model":
            _model(backend, argument, console)
        case "/save" | "/load" if not argument:
            _print(console, f"{verb} FILE")
        case "/save":
            _save(conversation, argument, console)
        case "/load":
            _load(conversation, argument, console)
        case _:
            _print(console, f"unknown command {verb}; /help lists the commands")
    return True


def _docs(
    conversation: Conversation, backend: ChatBackend, argument: str, console: Console
) -> None:
    if argument == "off":
        conversation.documents = None
    elif argument:
        backend.open_knowledge_base(argument)
        conversation.documents = argument
    current = conversation.documents
    _print(console, f"answering from {current}" if current else "answering without documents")
    if not argument:
        others = [f"  {name}" for name in backend.knowledge_bases() if name != current]
        _print(console, "\n".join(["knowledge bases:", *others]) if others else "/docs BASE | off")


def _model(backend: ChatBackend, argument: str, console: Console) -> None:
    if argument:
        backend.choose(argument)
        _print(console, f"{backend.name}  {backend.about}")
        return
    names = backend.models()
    for name in names if backend.name in names else [backend.name, *names]:
        _print(console, f"{'*' if name == backend.name else ' '} {name}")


def _set(conversation: Conversation, backend: ChatBackend, argument: str, console: Console) -> None:
    name, _, value = argument.partition(" ")
    if name not in _SETTABLE:
        values = ", ".join(f"{key} {getattr(conversation.settings, key)}" for key in _SETTABLE)
        _print(console, f"settings: {values}")
        return
    try:
        number: Any = float(value) if _SETTABLE[name] == "float" else int(value)
    except ValueError:
        _print(console, f"{name} must be a number, not '{value}'")
        return
    settings = replace(conversation.settings, **{name: number})
    backend.check(settings)
    conversation.settings = settings


def _save(conversation: Conversation, argument: str, console: Console) -> None:
    try:
        save(conversation, Path(argument).expanduser())
        _print(console, f"saved {argument}")
    except OSError as error:
        raise KhaoszError(f"could not write {argument}: {error.strerror}") from None


def _load(conversation: Conversation, argument: str, console: Console) -> None:
    try:
        conversation.system, conversation.turns = load(Path(argument).expanduser())
    except OSError as error:
        raise KhaoszError(f"could not read {argument}: {error.strerror}") from None
    _print(
        console, f"{len(conversation.turns) // 2} exchanges; /retry answers the last message again"
    )


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False)
