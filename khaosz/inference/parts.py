"""What a model says, taken apart as it comes: reasoning, content, calls of tools.

Reasoning stands between <think> and </think> before everything else, as DeepSeek-R1 and Qwen3 do
it; their templates may open it at the end of the prompt. Calls of tools are JSON between
<tool_call> and </tool_call> (Hermes, Qwen, SmolLM2, ours), or, with templates that know no such
mark, an answer that is one JSON object (Llama 3).
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from khaosz.inference.text_stream import possible_stop

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
_SPACE = " \t\r\n"

Calls = Literal["none", "marked", "bare"]


def opens_thought(prompt: str) -> bool:
    """Whether the end of a prompt has opened the reasoning, as some templates do."""
    return prompt.rstrip().endswith(THINK)


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Part:
    kind: Literal["reasoning", "content"]
    text: str


class PartStream:
    """Takes text and hands out parts. Only what may still become a mark, or white space before
    one, is held back. Joined, the pieces of a stream are the parts of the whole."""

    def __init__(self, calls: Calls = "none", *, thinking: bool = False) -> None:
        """`thinking`: the prompt has opened the reasoning already."""
        self._calls = calls
        self._held = ""
        self._state: Literal["begin", "reasoning", "content", "call", "object"] = (
            "reasoning" if thinking else "begin"
        )
        self._trim = thinking  # templates put line breaks behind their marks
        self._gap = ""  # white space before a call

    def feed(self, text: str) -> list[Part | ToolCall]:
        self._held += text
        found: list[Part | ToolCall] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[Part | ToolCall]:
        """The rest; a mark that never came, or a call that was cut short, is text."""
        found: list[Part | ToolCall] = []
        rest, self._held = self._held, ""
        match self._state:
            case "reasoning":
                self._say(found, "reasoning", rest.rstrip(_SPACE))
            case "call":
                self._say(found, "content", self._gap + CALL + rest)
            case "object":
                calls = _calls_of(rest)
                found += calls or [Part("content", rest)]
            case _:
                self._say(found, "content", rest)
        return found

    def _step(self, found: list[Part | ToolCall]) -> bool:
        """Whether there may be more to do with what is held."""
        match self._state:
            case "begin":
                begun = self._held.lstrip(_SPACE)
                if begun.startswith(THINK):
                    self._state, self._held = "reasoning", begun.removeprefix(THINK)
                    self._trim = True
                elif THINK.startswith(begun):
                    return False  # also of nothing but white space
                elif self._calls == "bare" and begun.startswith("{"):
                    self._state = "object"
                else:
                    self._state = "content"
                return True
            case "reasoning":
                return self._until(found, "reasoning", THOUGHT, "content")
            case "content":
                if self._calls == "marked":
                    return self._until(found, "content", CALL, "call")
                self._say(found, "content", self._held)
                self._held = ""
                return False
            case "call":
                body, mark, rest = self._held.partition(CALLED)
                if not mark:
                    return False
                calls = _calls_of(body)
                if not calls:
                    self._say(found, "content", self._gap + CALL + body + CALLED)
                found += calls
                self._state, self._held = "content", rest
                self._trim = self._trim or bool(calls)
                return True
            case "object":
                return False

    def _until(
        self,
        found: list[Part | ToolCall],
        kind: Literal["reasoning", "content"],
        mark: str,
        then: Literal["content", "call"],
    ) -> bool:
        """Hand out a part up to its closing mark, without the white space before it."""
        text, met, rest = self._held.partition(mark)
        if met:
            said = text.rstrip(_SPACE)
            self._say(found, kind, said)
            self._state, self._held, self._gap = then, rest, text[len(said) :]
            self._trim = self._trim or then == "content"
            return True
        keep = possible_stop(text, (mark,))
        ready = text[: len(text) - keep].rstrip(_SPACE)
        self._say(found, kind, ready)
        self._held = text[len(ready) :]
        return False

    def _say(
        self, found: list[Part | ToolCall], kind: Literal["reasoning", "content"], text: str
    ) -> None:
        text = text.lstrip(_SPACE) if self._trim else text
        if text:
            self._trim = False
            found.append(Part(kind, text))


def _calls_of(text: str) -> list[ToolCall]:
    """Of a JSON object with a name and arguments (or parameters), or a list of such; else none."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [_call_of(each) for each in (given if isinstance(given, list) else [given])]
    return [] if None in calls else [call for call in calls if call is not None]


def _call_of(given: Any) -> ToolCall | None:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return None
    arguments = given.get("arguments", given.get("parameters", {}))
    if isinstance(arguments, str):  # some spell the JSON out once more
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # NaN is no JSON, though Python reads it
        return None
    return ToolCall(f"call_{secrets.token_hex(12)}", _sendable(given["name"]), _sendable(text))


def _sendable(text: str) -> str:
    """Without the half of a character that an escape such as \\ud83d leaves: no UTF-8 has it."""
    return text.encode(errors="replace").decode()
