"""Split a model's streamed output into reasoning, content and tool calls.

Reasoning is between <think> and </think> before everything else, as in DeepSeek-R1 and Qwen3;
their templates may open it at the end of the prompt. Tool calls are JSON between <tool_call> and
</tool_call> (Hermes, Qwen, SmolLM2, ours) or, with templates without these markers, an answer
that is one JSON object (Llama 3). Between the markers there may be XML instead (Qwen3.5), or the
call is XML without them (MiniCPM5). Qwen2.5-Coder forgets the markers: with any template, an answer
that is the call of a known tool and nothing else, perhaps in a code block, is a call.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from khaosz.data.tokenizer.thinking import THINK, THOUGHT
from khaosz.inference import xml_calls
from khaosz.inference.text_stream import first_stop, possible_stop

CALL, CALLED = "<tool_call>", "</tool_call>"
FUNCTION = f"{xml_calls.OPENING} name="
_SPACE = " \t\r\n"
_IN_STRING, _OUTSIDE = re.compile(r'\\.|"', re.DOTALL), re.compile(rf'"|{CALLED}')  # of JSON
_MARKER = re.compile(CALLED)
_NAME = re.compile(r"""\s*(["']?)[^"'<>\n]*(\1\s*(>|$)|$)""")  # of a function, or its beginning
_JSON = re.compile(r"\s*([\[{]|$)")
_BARE_CALL = re.compile(r'\s*\{\s*("(name|parameters|arguments|type)|"?$)')
_FENCES = "", "```", "```json", "{", "```json{"
_FENCED = re.compile(r"\s*```(?:json)?\s*(.*?)\s*(?:```\s*)?", re.DOTALL)

Calls = Literal["none", "marked", "bare", "functions"]
_MARKS: dict[Calls, tuple[str, ...]] = {"marked": (CALL,), "functions": (FUNCTION, CALL)}


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
    """Takes text and returns parts. Only what may become a marker, or white space before one, is
    held back. Joined, the pieces of a stream are the parts of the whole text."""

    def __init__(
        self, calls: Calls = "none", *, thinking: bool = False, tools: Collection[str] = ()
    ) -> None:
        """`thinking`: the prompt has opened the reasoning already; `tools`: their names or, for
        the types of values in XML, the schemas of their parameters by name."""
        self._tools = frozenset(tools)
        self._schemas = tools if isinstance(tools, Mapping) else {}
        self._marks = _MARKS.get(calls, ())
        self._mark = CALL  # that opened the call, and
        self._closing = CALLED  # the one that ends it
        self._openings: tuple[str, ...] = (
            ("{",) if calls == "bare" else ()
        )  # of calls without markers
        if calls != "none":
            self._openings += tuple(
                f'{fence}{{"name":{json.dumps(name)},"{key}":'
                for fence in _FENCES
                for name in self._tools
                for key in ("arguments", "parameters")
            )
        self._pending = ""
        self._state: Literal["begin", "reasoning", "answer", "content", "call", "object"] = (
            "reasoning" if thinking else "begin"
        )
        self._trim = thinking  # templates put line breaks after their markers
        self._gap = ""  # white space before a call
        self._at = 0  # up to where a call has been searched for its end
        self._quoted: bool | None = False  # whether that is in a string; None: strings are ignored

    def feed(self, text: str) -> list[Part | ToolCall]:
        self._pending += text
        parts: list[Part | ToolCall] = []
        while self._step(parts):
            pass
        return parts

    def finish(self, *, cut: bool = False) -> list[Part | ToolCall]:
        """The rest. A call without its end marker counts if it is complete. Another incomplete
        marker or call is text, or nothing if the output was `cut` at its limit."""
        parts: list[Part | ToolCall] = []
        while (
            self._state == "call"
            and self._closing in self._pending
            and not self._calls_in(self._pending)
            and not (cut and self._is_xml(self._pending))  # in a value that was cut
        ):
            self._at, self._quoted = 0, None  # a quotation mark is missing
            while self._step(parts):
                pass
        rest, self._pending = self._pending, ""
        match self._state:
            case "reasoning":
                self._emit(
                    parts, "reasoning", _without_marker(rest, (THOUGHT,), cut).rstrip(_SPACE)
                )
            case "call":
                body = _without_marker(rest, (self._closing,), cut=True)
                calls = [] if cut and self._mark == FUNCTION else self._calls_in(body)
                if not calls and not (cut and self._may_be_call(rest)):
                    self._emit(parts, "content", self._gap + self._mark + rest)
                parts += calls
            case "object":
                calls = _calls_of(_unfenced(rest))
                if self._tools and any(call.name not in self._tools for call in calls):
                    calls = []
                if not calls and not (cut and _BARE_CALL.match(_unfenced(rest))):
                    self._emit(parts, "content", rest)
                parts += calls
            case "answer" if cut and '"name' in rest:
                pass  # the beginning of a call
            case state:
                marks = (THINK,) if state == "begin" else self._marks
                self._emit(parts, "content", _without_marker(rest, marks, cut))
        return parts

    def _step(self, parts: list[Part | ToolCall]) -> bool:
        """Whether the pending text may contain more."""
        match self._state:
            case "begin":
                start = self._pending.lstrip(_SPACE)
                if start.startswith(THINK):
                    self._state, self._pending = "reasoning", start.removeprefix(THINK)
                    self._trim = True
                elif THINK.startswith(start):
                    return False  # also of nothing but white space
                else:
                    self._state = "answer"
                return True
            case "reasoning":
                return self._until(parts, "reasoning", (THOUGHT,), "answer")
            case "answer":
                start = "".join(self._pending.split())
                if start.startswith(self._openings):
                    self._state = "object"
                elif any(opening.startswith(start) for opening in self._openings):
                    return False
                else:
                    self._state = "content"
                return True
            case "content":
                if self._marks:
                    return self._until(parts, "content", self._marks, "call")
                self._emit(parts, "content", self._pending)
                self._pending = ""
                return False
            case "call":
                end = self._end_of_call()
                if end is None:
                    return False
                body, rest = self._pending[:end], self._pending[end + len(self._closing) :]
                calls = self._calls_in(body)
                if not calls:
                    text = self._gap + self._mark + body + self._closing
                    self._emit(parts, "content", text)
                parts += calls
                self._state, self._pending = "content", rest
                self._trim = self._trim or bool(calls)
                return True
            case "object":
                return False

    def _until(
        self,
        parts: list[Part | ToolCall],
        kind: Literal["reasoning", "content"],
        marks: tuple[str, ...],
        then: Literal["answer", "call"],
    ) -> bool:
        """Emit a part up to the first of its closing markers, without the white space before."""
        text, start = self._pending, first_stop(self._pending, marks)
        if start is not None:
            self._mark = next(mark for mark in marks if text.startswith(mark, start))
            self._closing = xml_calls.END if self._mark == FUNCTION else CALLED
            text, rest = text[:start], text[start + len(self._mark) :]
            body = text.rstrip(_SPACE)
            self._emit(parts, kind, body)
            self._state, self._pending, self._gap = then, rest, text[len(body) :]
            self._at, self._quoted = 0, False
            self._trim = self._trim or then == "answer"
            return True
        keep = possible_stop(text, marks)
        ready = text[: len(text) - keep].rstrip(_SPACE)
        self._emit(parts, kind, ready)
        self._pending = text[len(ready) :]
        return False

    def _end_of_call(self) -> int | None:
        """Where the end marker begins. A string of the JSON, or a value of the XML, may hold the
        same text."""
        if (is_xml := self._is_xml(self._pending)) is None:
            return None
        while is_xml:
            end = self._pending.find(self._closing, self._at)
            if end < 0:
                self._at = max(self._at, len(self._pending) - len(self._closing) + 1)
                return None
            if self._quoted is None or self._calls_in(self._pending[:end]):
                return end
            self._at = end + 1
        while True:
            tokens = {True: _IN_STRING, False: _OUTSIDE, None: _MARKER}[self._quoted]
            if (token := tokens.search(self._pending, self._at)) is None:
                # The end may be a part of a token.
                self._at = max(self._at, len(self._pending) - len(CALLED) + 1)
                return None
            if token[0] == CALLED:
                return token.start()
            if token[0] == '"':
                self._quoted = not self._quoted
            self._at = token.end()

    def _is_xml(self, body: str) -> bool | None:
        """None: too short to tell."""
        start = body.lstrip()
        if self._mark == FUNCTION or start.startswith(xml_calls.OPENING):
            return True
        return None if xml_calls.OPENING.startswith(start) else False

    def _calls_in(self, body: str) -> list[ToolCall]:
        """Of the text between the markers of a call; none if it is not complete."""
        if not self._is_xml(body):
            return _calls_of(body)
        if self._mark == FUNCTION:
            body = FUNCTION + body + xml_calls.END
        numbers: dict[str, str] = {}
        named = xml_calls.parse_calls(
            body,
            self._schemas,
            lambda text: _parsed(text, numbers),
            strings=self._quoted is not None,
        )
        calls = [_call_of({"name": name, "arguments": each}, numbers) for name, each in named]
        return [call for call in calls if call is not None]

    def _may_be_call(self, body: str) -> bool:
        """Whether a cut text after an opening marker is the beginning of a call."""
        if self._mark == FUNCTION:
            return _NAME.match(body) is not None
        return self._is_xml(body) is not False or _JSON.match(body) is not None

    def _emit(
        self, parts: list[Part | ToolCall], kind: Literal["reasoning", "content"], text: str
    ) -> None:
        text = text.lstrip(_SPACE) if self._trim else text
        if text:
            self._trim = False
            parts.append(Part(kind, text))


def _without_marker(text: str, marks: tuple[str, ...], cut: bool) -> str:
    """Without the beginning of a marker, two characters or more, at the end of a `cut` output."""
    keep = possible_stop(text, marks) if cut else 0
    return text[:-keep] if keep > 1 else text


def _unfenced(text: str) -> str:
    """Without a code block's marks around the text."""
    match = _FENCED.fullmatch(text)
    return match[1] if match else text


def _calls_of(text: str) -> list[ToolCall]:
    """Of a JSON object with a name and arguments (or parameters), or a list of such; else none.
    Strings may hold raw line breaks and tabs, as small models write them."""
    numbers: dict[str, str] = {}
    text = text.strip()
    if text.startswith("{{") and text.endswith("}}"):  # as the template of Qwen2.5-Coder shows it
        text = text[1:-1]
    try:
        value = _parsed(text, numbers)
    except (ValueError, RecursionError):
        return []
    calls = [_call_of(each, numbers) for each in (value if isinstance(value, list) else [value])]
    return [] if None in calls else [call for call in calls if call is not None]


def _call_of(value: Any, numbers: dict[str, str]) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some encode the JSON twice
        try:
            arguments = _parsed(arguments, numbers)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    for key, number in numbers.items():
        text = text.replace(f'"{key}"', number)
    return ToolCall(f"call_{secrets.token_hex(12)}", _sendable(value["name"]), _sendable(text))


def _parsed(text: str, numbers: dict[str, str]) -> Any:
    """The value of JSON. Numbers that Python cannot hold, as 1e999 and integers of more than 4,300
    digits, are kept in `numbers` as they are written, by the key that stands in their place."""

    def kept(number: str) -> str:
        key = secrets.token_hex(16)
        numbers[key] = number
        return key

    def decimal(number: str) -> float | str:
        value = float(number)
        return value if math.isfinite(value) else kept(number)

    def whole(number: str) -> int | str:
        return int(number) if len(number) <= 4300 else kept(number)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON, though Python reads it")

    return json.loads(
        text, strict=False, parse_float=decimal, parse_int=whole, parse_constant=constant
    )


def _sendable(text: str) -> str:
    """Without the half of a character that an escape such as \\ud83d leaves: it has no UTF-8."""
    return text.encode(errors="replace").decode()
