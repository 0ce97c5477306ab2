"""The commands of the chat: lines that begin with /."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from khaosz.cli.terminal.conversation import ChatBackend, Conversation, Settings, load, save
from khaosz.cli.terminal.defaults import TYPES, save_defaults
from khaosz.errors import KhaoszError
from khaosz.interop.sampling import FALLBACK, NAMES

HELP = '''\
/help               show this list                       显示本说明
/docs BASE          answer from a knowledge base; off    根据知识库回答；/docs off 关闭
/model NAME         switch models; without NAME: list    切换模型；不写名称则列出
/system TEXT        set the system message, restart      设置系统提示并重新开始
/set                show the settings in force           显示生效的设置
/set NAME VALUE     change one; VALUE default: the model's own
                    修改一项；VALUE 写 default 则用模型自己的值
                    temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty,
                    frequency_penalty, max_tokens, seed, thinking_budget, context
/set save           keep settings and system message for new chats
                    将设置与系统提示存为新对话的默认值
/think on | off     answer with or without thinking      开启或关闭思考
/thoughts           show the thoughts of the last answer 显示上一个回答的思考过程
/retry              answer the last message again        重新回答上一句
/anyway             ask again, though no passage fits    没有相关段落也让模型回答
/reset              clear the conversation               清空对话，重新开始
/save FILE          save the conversation as JSON        将对话保存为 JSON
/load FILE          continue a saved conversation        继续已保存的对话
/exit               quit (also Ctrl-D)                   退出（也可按 Ctrl-D）

"""..."""           a message of several lines           多行消息
...\\                continues on the next line           行末反斜杠：下一行继续'''
COMMANDS = tuple(
    dict.fromkeys(line.split()[0] for line in HELP.splitlines() if line.startswith("/"))
)

_SETTABLE = {name: kind for name, kind in TYPES.items() if kind is not bool}
# What is in force where neither the user nor the model says.
_OFF = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": "none", "thinking_budget": "none",
}  # fmt: skip


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
        case "/think":
            _think(conversation, backend, argument, console)
        case "/thoughts":
            text = conversation.thoughts.strip() or "the last answer has no thoughts"
            console.print(text, style="dim", markup=False, soft_wrap=True)
        case "/retry" | "/anyway":
            if len(conversation.turns) < 2:
                _print(console, "nothing to retry")
            else:
                message = conversation.turns[-2]["content"]
                turns, anyway = conversation.turns[:-2], verb == "/anyway"
                retried = replace(conversation, turns=turns, anyway=anyway)
                answer(retried, message, backend, console)
                conversation.turns, conversation.thoughts = retried.turns, retried.thoughts
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


def describe_sampling(backend: ChatBackend, settings: Settings) -> str:
    """Which sampling is in force, in one line."""
    values = settings.in_force(backend.sampling)
    shown = ", ".join(f"{name} {value:g}" for name, value in values.items() if name in NAMES)
    asked = settings.asked().keys() & set(NAMES)
    if backend.sampling and backend.sampling != FALLBACK:
        source = "the model's own, where not set" if asked else "the model's own"
    else:
        source = "the server's" if not backend.sampling else "usual values"
    line = f"sampling: {shown}  ({source})" if shown else f"sampling: {source}"
    if backend.thinking in ("switch_on", "switch_off"):
        on = backend.thinking == "switch_on" if settings.think is None else settings.think
        line += f"; thinking {'on' if on else 'off'}"
    return line


def _think(
    conversation: Conversation, backend: ChatBackend, argument: str, console: Console
) -> None:
    if argument not in ("on", "off", ""):
        _print(console, "/think on | off")
        return
    if argument:
        conversation.settings = replace(conversation.settings, think=argument == "on")
    kind, think = backend.thinking, conversation.settings.think
    if kind in ("none", "always"):
        _print(console, f"this model {'never' if kind == 'none' else 'always'} thinks: no switch")
        return
    on = kind == "switch_on" if think is None else think
    _print(console, f"thinking is {'on' if on else 'off'}")


def _set(conversation: Conversation, backend: ChatBackend, argument: str, console: Console) -> None:
    name, _, value = argument.partition(" ")
    value = value.strip()
    if name == "save" and not value:
        _print(console, f"saved {save_defaults(conversation.settings, conversation.system)}")
        return
    if name == "context" and value.isdecimal():
        backend.resize(int(value))
        _print(console, backend.about)
        return
    if name not in _SETTABLE:
        _print(console, _all_settings(conversation, backend))
        return
    number: Any = Settings().max_tokens if name == "max_tokens" else None
    if value != "default":
        try:
            number = _SETTABLE[name](value)
        except ValueError:
            _print(console, f"{name} must be a number, not '{value}'")
            return
    settings = replace(conversation.settings, **{name: number})
    backend.check(settings)
    conversation.settings = settings


def _all_settings(conversation: Conversation, backend: ChatBackend) -> str:
    settings = conversation.settings
    own = {name: value for name, value in backend.sampling.items() if name in _SETTABLE}
    values = {**_OFF, **settings.in_force(own)}
    lines = [f"settings: {', '.join(f'{key} {values[key]}' for key in _SETTABLE)}"]
    lines += [backend.about, describe_sampling(backend, settings)]
    lines += [f"system: {conversation.system}"] if conversation.system else []
    return "\n".join(lines)


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
