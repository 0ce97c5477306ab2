"""Messages and tools in requests of OpenAI's API, as clients send them and send answers back.

Harmless fields of OpenAI's types are accepted and have no effect; those that this server cannot
honour are refused by name.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

MAX_MESSAGES = 4096
MAX_TOOLS = 128


class RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _refuse(value: Any) -> None:
    if value not in (None, False, "", [], {}):
        raise ValueError("not supported by this server")


Ignored = Annotated[Any, Field(description="Accepted, without effect.", exclude=True)]
Unsupported = Annotated[Any, AfterValidator(_refuse), Field(description="Null only.", exclude=True)]

_MEDIA = {
    "image_url": "images", "input_image": "images", "image": "images", "input_audio": "sound",
    "audio_url": "sound", "video_url": "video", "file": "files", "input_file": "files",
    "document": "files",
}  # fmt: skip


class TextPart(RequestModel):
    type: Literal["text"]
    text: str
    cache_control: Ignored = None
    prompt_cache_breakpoint: Ignored = None


class RefusalPart(RequestModel):
    """Of an answer by another server."""

    type: Literal["refusal"]
    refusal: str


def text_only(content: Any) -> Any:
    """Raises ValueError for parts of another kind than text."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _MEDIA:
            raise ValueError(
                f"this model reads text only: {_MEDIA[kind]} ({kind!r}) cannot be sent to it"
            )
    return content


Content = Annotated[
    str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)], BeforeValidator(text_only)
]


class FunctionCall(BaseModel):
    """`arguments`: a JSON object as a text; models and servers also write an empty text."""

    name: str
    arguments: str = ""

    def parsed(self) -> Any:
        """The object; a text that is none is handed over as it is."""
        try:
            value = json.loads(self.arguments, strict=False) if self.arguments.strip() else {}
        except (ValueError, RecursionError):
            return self.arguments
        return value if isinstance(value, dict) else self.arguments


class ToolCall(BaseModel):
    """Of an earlier answer. What else a client's object has, such as `index`, has no effect."""

    model_config = ConfigDict(strict=True)

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        # As an object: templates turn it into JSON themselves, and would quote a text.
        function = {"name": self.function.name, "arguments": self.function.parsed()}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(RequestModel):
    """`name`: of the participant or the tool; few templates read it."""

    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The fields that the request gives, as transformers hands them to the chat template."""
        return self.model_dump(exclude_unset=True)


class InputMessage(ChatMessage):
    role: Literal["system", "developer", "user"]
    content: Content

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {**super().for_template(), "role": role}


class AssistantMessage(ChatMessage):
    """A client may send an answer back as its object has it: the model sees the content, the
    reasoning and the tool calls, and other fields have no effect."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["assistant"]
    content: (
        Annotated[
            str | Annotated[list[TextPart | RefusalPart], Field(max_length=MAX_MESSAGES)],
            BeforeValidator(text_only),
        ]
        | None
    ) = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Unsupported = None  # of OpenAI's API before tools
    audio: Unsupported = None

    def for_template(self) -> dict[str, Any]:
        message = super().for_template()
        message.pop("tool_calls", None)
        if isinstance(self.content, list):
            parts = [part for part in self.content if isinstance(part, TextPart)]
            message["content"] = [{"type": "text", "text": part.text} for part in parts]
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        elif not message.get("content"):
            message["content"] = ""
        return message


class ToolMessage(ChatMessage):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[InputMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


ToolName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,128}$")]


class Function(RequestModel):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # forced calls fit their schema in either case


class Tool(RequestModel):
    type: Literal["function"]
    function: Function
    _sent: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, validate: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = validate(value)
        tool._sent = value
        return tool

    def for_template(self) -> dict[str, Any]:
        """As it was sent, in the order of its keys: templates print the whole object."""
        return self._sent


class FunctionName(RequestModel):
    name: str


class ToolChoice(RequestModel):
    type: Literal["function"]
    function: FunctionName


class AllowedList(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(RequestModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedList
