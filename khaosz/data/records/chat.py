"""Chat records of the common SFT layouts, converted to one: messages and tools.

Understood are OpenAI's `{"messages": [...]}`, Alpaca's `{"instruction", "input", "output"}` (with
`system` and `history`) and ShareGPT's `{"conversations": [{"from", "value"}]}`. A record that
cannot be trained on raises DataError with a short reason; the caller counts the reasons.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from khaosz.errors import DataError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


@dataclass
class Conversation:
    """A chat that ends with an assistant turn, ready for `encode_chat`."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


def to_messages(record: dict[str, Any]) -> Conversation:
    """Read one record of any known layout.

    Turns after the last assistant turn are dropped: nothing in them is trained. Raises DataError
    with a short reason for an unknown layout or role, content that is not text, no assistant turn,
    or an assistant turn without text and tool calls.
    """
    if not isinstance(record, dict):
        raise DataError(f"record is a {type(record).__name__}, not an object")
    if "messages" in record:
        messages = [_openai_message(turn) for turn in _turns(record, "messages")]
    elif "conversations" in record:
        messages = [_sharegpt_message(turn) for turn in _turns(record, "conversations")]
        messages = _system(record) + messages
    elif "output" in record and ("instruction" in record or "input" in record):
        messages = _alpaca(record)
    else:
        raise DataError(
            "unknown layout with keys " + (", ".join(sorted(map(str, record))) or "(none)"),
            hint="give messages, conversations, or instruction and output",
        )
    last = max((n for n, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise DataError("no assistant turn")
    messages = messages[: last + 1]
    for message in messages:
        if (
            message["role"] == "assistant"
            and not message["content"].strip()
            and not message.get("tool_calls")
        ):
            raise DataError("empty assistant turn")
    return Conversation(messages, _tools(record.get("tools")))


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or text parts joined. Raises DataError."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise DataError(f"content part of type {kind!r} is not text")
            texts.append(part["text"])
        return "".join(texts)
    raise DataError(f"content is {type(content).__name__}, not text")


def cut_at_turn(loss_mask: np.ndarray, limit: int) -> int:
    """The longest prefix length <= `limit` that ends where an assistant turn ends, 0 if none does.

    loss_mask: (length,), 1 on trained tokens. A turn ends on the last 1 of a run.
    """
    trained = np.asarray(loss_mask) != 0
    following = np.append(trained[1:], False)
    ends = np.flatnonzero(trained & ~following) + 1
    ends = ends[ends <= limit]
    return int(ends[-1]) if ends.size else 0


def _turns(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    turns = record[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{key} is not a list of objects")
    return turns


def _openai_message(turn: dict[str, Any]) -> Message:
    role = turn.get("role")
    if role == "developer":  # OpenAI's newer name of the system role
        role = "system"
    if role not in ROLES:
        raise DataError(f"unknown role {role!r}")
    calls = [_call(call) for call in _parsed_list(turn.get("tool_calls"), "tool_calls")]
    content = "" if turn.get("content") is None and calls else text_of(turn.get("content"))
    message: Message = {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise DataError(f"tool_calls in a {role} turn")
        message["tool_calls"] = calls
    return message


def _sharegpt_message(turn: dict[str, Any]) -> Message:
    source = turn.get("from")
    role = _SHAREGPT_ROLES.get(source) if isinstance(source, str) else None
    if role is None:
        raise DataError(f"unknown role {source!r}")
    if source == "function_call":
        calls = [_call(call) for call in _parsed_list(turn.get("value"), "function_call")]
        if not calls:
            raise DataError("empty assistant turn")
        return {"role": role, "content": "", "tool_calls": calls}
    return {"role": role, "content": text_of(turn.get("value"))}


def _alpaca(record: dict[str, Any]) -> list[Message]:
    messages = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError("history is not a list of [question, answer] pairs")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("history is not a list of [question, answer] pairs")
        messages += _exchange(pair[0], pair[1])
    parts = (text_of(record.get(key) or "") for key in ("instruction", "input"))
    question = "\n".join(part for part in parts if part)
    if not question.strip():
        raise DataError("empty instruction")
    return messages + _exchange(question, record["output"])


def _exchange(question: Any, answer: Any) -> list[Message]:
    return [
        {"role": "user", "content": text_of(question)},
        {"role": "assistant", "content": text_of(answer)},
    ]


def _system(record: dict[str, Any]) -> list[Message]:
    system = record.get("system")
    return [{"role": "system", "content": text_of(system)}] if system else []


def _call(call: Any) -> dict[str, Any]:
    """One tool call as {"type", "function": {"name", "arguments"}}, arguments parsed.

    OpenAI writes the arguments as a JSON string; templates render objects.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError("tool call without a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise DataError(f"tool call arguments are not JSON: {error}") from error
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any) -> list[dict[str, Any]]:
    schemas = _parsed_list(tools, "tools")
    if not all(isinstance(schema, dict) for schema in schemas):
        raise DataError("tools is not a list of JSON schemas")
    return schemas


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
