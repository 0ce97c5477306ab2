"""Messages of a chat in the spellings in use: lists, dialogues in one text, roles, tool calls.

A list holds messages (`role` and `content`, or ShareGPT's `from` and `value`), exchanges
(`{"human": ..., "assistant": ...}`), pairs `[question, answer]`, or texts of user and assistant in
turn. A text may hold such a list as JSON, or a dialogue as in HH-RLHF and HelpSteer2.
"""

from __future__ import annotations

import json
import re
from typing import Any

from khaosz.errors import DataError, quoted

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("developer",), "system"),  # OpenAI's newer name of the system role
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatbot", "chatgpt", "model", "ai"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(
        ("observation", "function", "function_response", "tool_response", "ipython"), "tool"
    ),
}
_CALL_ROLES = ("function_call", "tool_call")  # their content is the call, as JSON
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
# Fields that templates read, beside role, content and tool_calls.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PASSED = (*_REASONING, "name", "tool_call_id")
_ASKED = ("human", "user", "prompt", "instruction", "question", "query", "input")
_ANSWERED = ("assistant", "bot", "gpt", "completion", "output", "response", "answer")
_TEXT_PARTS = ("text", "input_text", "output_text")
_SPEAKERS = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_MARKED = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


class LeftOut(DataError):
    """A record that was read and is not used: it does not count as unread."""


def read_turns(
    value: Any, key: str, *, text_role: str | None = None, weights: bool = False
) -> list[Message]:
    """The messages of a value of any spelling; a text that is none of them is one message of
    `text_role`. `weights` keeps OpenAI's `weight` of assistant messages, 0 or 1.

    `key` names the value in errors. Raises DataError.
    """
    if isinstance(value, str):
        value = _in_text(value)
        if isinstance(value, str):
            if text_role is None:
                raise DataError(f"{key} is text, not messages")
            return [{"role": text_role, "content": value}]
    if isinstance(value, dict):
        value = value["messages"] if isinstance(value.get("messages"), list) else _rows(value)
    wanted = "not a list of messages" if text_role is None else "neither text nor messages"
    if not isinstance(value, list):
        raise DataError(f"{key} is {wanted}")
    if value and text_role is None and all(isinstance(turn, str) for turn in value):
        texts = zip(("user", "assistant") * len(value), value, strict=False)
        return [{"role": role, "content": text} for role, text in texts]
    turns: list[Message] = []
    for turn in value:
        if isinstance(turn, list | tuple) and len(turn) == 2:
            turns += exchange(*turn)
        elif not isinstance(turn, dict):
            raise DataError(f"{key} is {wanted}")
        elif pair := _exchange_of(turn):
            turns += pair
        else:
            turns.append(_message(turn, weights))
    return turns


def exchange(question: Any, answer: Any) -> list[Message]:
    return [
        {"role": "user", "content": text_of(question)},
        {"role": "assistant", "content": text_of(answer)},
    ]


def text_of(content: Any) -> str:
    """The text of a message's content: a string, text parts joined, or the one member of a union
    (of a table) that is set. Raises DataError."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        members = [value for value in content.values() if value is not None]
        is_union = len(members) == 1 and isinstance(members[0], str | list)
        return text_of(members[0] if is_union else [content])
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
                raise DataError(f"content part of type {quoted(kind)} is not text")
            texts.append(part["text"])
        return "".join(texts)
    raise DataError(f"content is {type(content).__name__}, not text")


def has_reasoning(message: Message) -> bool:
    return any(message.get(key) for key in _REASONING)


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """JSON schemas of tools: a list, one object, or either as JSON. Raises DataError."""
    schemas = _parsed_list(tools, "tools")
    if not all(isinstance(schema, dict) for schema in schemas):
        raise DataError("tools is not a list of JSON schemas")
    return schemas


def _rows(value: dict[str, Any]) -> list[dict[str, Any]]:
    """One message, or the messages of columns, `{"role": [...], "content": [...]}`: so are lists of
    objects written by Hugging Face's `Sequence`."""
    columns = list(value.values())
    if _first(value, _ROLE_KEYS) is None or not all(isinstance(each, list) for each in columns):
        return [value]
    if len({len(each) for each in columns}) > 1:
        raise DataError(f"{', '.join(map(str, value))} are lists of different lengths")
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _in_text(text: str) -> Any:
    """Messages that are written as JSON, or as a dialogue; otherwise the text itself."""
    if text.lstrip()[:1] in ("[", "{") and text.rstrip()[-1:] in ("]", "}"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        turns = value if isinstance(value, list) else [value]
        is_chat = turns and all(
            isinstance(t, dict) and _first(t, _ROLE_KEYS) is not None for t in turns
        )
        return value if is_chat else text
    if "<extra_id_1>" in text:
        first, *rest = _MARKED.split(text)
        return _dialogue(["User", first, *rest]) if rest else text
    if text.lstrip().startswith("Human:") and (
        "\n\nAssistant:" in text or text.startswith("\n\nHuman:")
    ):
        return _dialogue(_SPEAKERS.split(text)[1:])
    return text


def _dialogue(pieces: list[str]) -> list[Message]:
    """Of speakers and their texts in turn. A last assistant turn that is empty asks for an
    answer: it is not a message."""
    turns = [
        {"role": "assistant" if speaker == "Assistant" else "user", "content": text.strip()}
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def _first(fields: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first of `keys` that is not null, or None."""
    for key in keys:  # a loop: this runs several times per message
        if (value := fields.get(key)) is not None:
            return value
    return None


def _exchange_of(turn: dict[str, Any]) -> list[Message] | None:
    """`{"human": ..., "assistant": ...}` and the like: a question and its answer."""
    if _first(turn, _ROLE_KEYS) is not None:
        return None
    question, answer = _first(turn, _ASKED), _first(turn, _ANSWERED)
    if question is None or answer is None:
        return None
    system = turn.get("system")
    first = [{"role": "system", "content": text_of(system)}] if system else []
    return first + exchange(question, answer)


def _message(turn: dict[str, Any], weights: bool) -> Message:
    source = _first(turn, _ROLE_KEYS)
    source = source.strip().lower() if isinstance(source, str) else source
    role = _ROLES.get(source) if isinstance(source, str) else None
    if role is None:
        raise DataError(f"unknown role {quoted(source)}")
    content = _first(turn, _CONTENT_KEYS)
    if source in _CALL_ROLES:
        calls, content = [_call(call) for call in _parsed_list(content, source)], None
        if not calls:
            raise LeftOut("empty assistant turn")
    else:
        raw = turn.get("tool_calls") or turn.get("function_call")  # the latter until 2023
        calls = [_call(call) for call in _parsed_list(raw, "tool_calls")] if raw else []
    if calls and role != "assistant":
        raise DataError(f"tool_calls in a {role} turn")
    message: Message = {"role": role}
    if content is not None or not calls:  # transformers hides a null from templates
        message["content"] = text_of(content)
    if calls:
        message["tool_calls"] = calls
    if len(turn) > 2:
        message |= {key: turn[key] for key in _PASSED if isinstance(turn.get(key), str)}
    if weights and role == "assistant" and turn.get("weight") is not None:
        if turn["weight"] not in (0, 1):
            raise DataError(f"weight {quoted(turn['weight'])} is neither 0 nor 1")
        message["weight"] = int(turn["weight"])
    return message


def _call(call: Any) -> dict[str, Any]:
    """One tool call as {"type", "function": {"name", "arguments"}}, arguments parsed.

    OpenAI writes the arguments as a JSON string; templates render objects.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError("tool call without a name")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}  # as vLLM reads a call without any
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise DataError(f"tool call arguments are not JSON: {error}") from error
    given = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    named = {"name": function["name"], "arguments": arguments}
    return {**given, "type": "function", "function": named}  # in the order of a request


def _parsed_list(value: Any, name: str) -> list[Any]:
    """A list, or one object, or either as a JSON string; None and "" are an empty list."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{name} is not JSON: {error}") from error
    if value is None or value == "":
        return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise DataError(f"{name} is not a list")
    return value
