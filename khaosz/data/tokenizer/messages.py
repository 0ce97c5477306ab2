"""Messages and tools in the form in which a chat template expects them.

They reach the template as transformers' `apply_chat_template` hands them over: unchanged, except
that keys of a message whose value is null are left out, and that reasoning is found under each of
its names. What callers write in two ways takes the form that the template can read, which is found
by rendering short chats: vLLM parses the arguments of every call and inspects the template's syntax
for parts of text, but some templates concatenate arguments as text, and others test for null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from khaosz.errors import DataError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Render = Callable[[list[Message], Tools], str]
"""Renders messages and tools as they are. Raises DataError."""

_REASONING = ("reasoning_content", "thinking", "reasoning")  # as in transformers
_TOOL_ROLES = ("tool", "ipython", "function", "observation")
_ABSENT: Message = {}
_CONTENTS: tuple[Message, ...] = (_ABSENT, {"content": None}, {"content": ""})

# Of the chats that are rendered to learn what a template can read. Mistral wants ids of nine
# letters and digits.
_KEY, _TEXT, _ID = "zq7key", "zq7text", "zq7callid"
_USER = {"role": "user", "content": "?"}
_FUNCTION = {"name": "zq7name", "arguments": {_KEY: _TEXT}}
_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_DEFAULTS: dict[str, Any] = {"description": "", "parameters": _PARAMETERS}
_BARE: dict[str, Any] = {"type": "function", "function": {"name": "zq7name"}}
_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "zq7name", **_DEFAULTS}}


@dataclass(frozen=True)
class Forms:
    """What a template can read. `objects`, `strings`: the content beside tool calls without text,
    with arguments of that type; None where the template cannot render such calls. `parts`: the
    roles whose content may be a list. `bare_tools`: tools without description and parameters."""

    objects: Message | None
    strings: Message | None
    parts: frozenset[str]
    bare_tools: bool


def check_messages(messages: Sequence[Message]) -> None:
    """Raises DataError for a chat without messages and for one that no template reads right."""
    if not messages:
        raise DataError("the chat has no messages")
    for n, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise DataError(f"message {n} has no role")
        match content:
            case str():
                continue
            case list() if all(map(_is_text_part, content)):
                continue
            case dict() if role in _TOOL_ROLES:
                continue
            case None if role == "assistant" and any(
                value is not None for key, value in message.items() if key not in ("role", "name")
            ):
                continue
        raise DataError(f"message {n} ({role}): content is {type(content).__name__}, not text")


def for_template(messages: Sequence[Message], forms: Callable[[], Forms]) -> list[Message]:
    """The messages as the template gets them; none is changed in place."""
    return [_message(message, forms) for message in messages]


def tools_for_template(tools: Sequence[dict[str, Any]], forms: Callable[[], Forms]) -> Tools:
    """The tools; description and parameters, which OpenAI's API lets a tool omit, are added only
    for a template that fails without them."""
    functions = [tool.get("function", tool) for tool in tools]
    if all(map(_is_complete, functions)) or forms().bare_tools:
        return list(tools)
    return [
        {**tool, "function": {**_DEFAULTS, **function}}
        if "function" in tool and isinstance(function, dict)
        else {**_DEFAULTS, **tool}
        for tool, function in zip(tools, functions, strict=True)
    ]


def text_of_parts(content: Any) -> str:
    """The text of a content: a string, parts joined, or nothing for one that is absent."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _is_complete(function: Any) -> bool:
    return isinstance(function, dict) and _DEFAULTS.keys() <= function.keys()


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _message(message: Message, forms: Callable[[], Forms]) -> Message:
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if isinstance(message.get("content"), list) and message["role"] not in forms().parts:
        message["content"] = text_of_parts(message["content"])
    calls = message.get("tool_calls")
    if isinstance(calls, list) and all(isinstance(call, dict) for call in calls) and calls:
        content, message["tool_calls"] = _calls(calls, forms())
        if "content" not in message:
            message |= content
    return message


def _calls(calls: list[dict[str, Any]], forms: Forms) -> tuple[Message, list[dict[str, Any]]]:
    """The content beside calls without text, and the calls."""
    strings = any(isinstance(_function(call).get("arguments"), str) for call in calls)
    here, other = (forms.strings, forms.objects) if strings else (forms.objects, forms.strings)
    if here is not None or other is None:
        return here or _ABSENT, calls
    return other, [_converted(call, _parsed if strings else _written) for call in calls]


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}


def _converted(call: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    function = _function(call)
    changed = {**function, "arguments": convert(function.get("arguments"))}
    return {**call, "function": changed} if "function" in call else changed


def _parsed(arguments: Any) -> Any:
    """No arguments are an empty object, as in vLLM."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _written(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def probe(render: Render) -> Forms:
    """What the template behind `render` can read, by what it makes of short chats."""

    def shows(word: str, messages: list[Message], tools: Tools = None) -> bool:
        """Whether the text has `word`, neither quoted twice nor as Python prints an object."""
        try:
            text = render(messages, tools)
        except DataError:
            return False
        wrong = (f'\\"{word}', f"'{_KEY}': ", f"'text': '{word}")
        return word in text and not any(each in text for each in wrong)

    def called(content: Message, arguments: Any, result: Any = "!") -> list[Message]:
        call = {"id": _ID, "type": "function", "function": {**_FUNCTION, "arguments": arguments}}
        answer = {"role": "tool", "tool_call_id": _ID, "name": "zq7name", "content": result}
        return [_USER, {"role": "assistant", **content, "tool_calls": [call]}, answer]

    def beside(arguments: Any) -> Message | None:
        readable = (each for each in _CONTENTS if shows(_KEY, called(each, arguments), [_TOOL]))
        return next(readable, None)

    def renders(tool: dict[str, Any]) -> bool:
        try:
            render([_USER], [tool])
        except DataError:
            return False
        return True

    as_object, as_string = _FUNCTION["arguments"], json.dumps(_FUNCTION["arguments"])
    objects, strings = beside(as_object), beside(as_string)
    parts = [{"type": "text", "text": _TEXT}]
    chats: dict[str, list[Message]] = {
        "system": [{"role": "system", "content": parts}, _USER],
        "user": [{"role": "user", "content": parts}],
        "assistant": [_USER, {"role": "assistant", "content": parts}, _USER],
        "tool": called({"content": ""}, as_string if objects is None else as_object, parts),
    }
    readable = frozenset(role for role, chat in chats.items() if shows(_TEXT, chat))
    return Forms(objects, strings, readable, renders(_BARE) or not renders(_TOOL))
