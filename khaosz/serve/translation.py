"""What translations of other protocols into chats share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from khaosz.inference.parts import ToolCall
from khaosz.serve.errors import ApiError
from khaosz.serve.schema import ChatRequest

M = TypeVar("M", bound=BaseModel)


def translated_chat(values: Mapping[str, Any]) -> ChatRequest:
    """A chat of these fields. Raises `ApiError` as `validated` does."""
    return validated(ChatRequest, values)


def validated(model: type[M], values: Mapping[str, Any]) -> M:
    """A request of these fields; those that are None are left out. Raises `ApiError` for fields
    that do not go together."""
    try:
        return model.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raised = first.get("ctx", {}).get("error")
        message = str(raised) if isinstance(raised, ValueError) else first["msg"]
        param = str(first["loc"][0]) if first["loc"] else message.partition(" ")[0]
        known = param in model.model_fields
        raise ApiError(400, message, param=param if known else None) from None


def text_content(texts: Sequence[str]) -> str | list[dict[str, str]]:
    """A message's content: a text, or parts."""
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def function_tool(name: str, description: str | None, parameters: Any) -> dict[str, Any]:
    """A tool as a chat has it, without the fields that are None."""
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def function_call(id: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier call as a chat has it."""
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": text}}


def arguments_of(call: ToolCall) -> Any:
    """The arguments as an object. Numbers that JSON cannot send on, as 1e999 and integers of more
    than 4,300 digits, are texts."""

    def decimal(text: str) -> float | str:
        value = float(text)
        return value if math.isfinite(value) else text

    def whole(text: str) -> int | str:
        return int(text) if len(text) <= 4300 else text

    return json.loads(call.arguments, parse_float=decimal, parse_int=whole)
