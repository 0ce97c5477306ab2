"""OpenAI's Responses API, translated into chats. Nothing is stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from khaosz.serve.answering import Answering
from khaosz.serve.errors import ApiError, errors
from khaosz.serve.messages import RefusalPart
from khaosz.serve.openai.response_output import ResponseLayout
from khaosz.serve.openai.response_schema import (
    AllowedFunctions,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputCount,
    InputCountRequest,
    InputMessageItem,
    Item,
    JsonSchemaFormat,
    NamedFunction,
    OutputMessageItem,
    ReasoningInputItem,
    ResponseReply,
    ResponseRequest,
)
from khaosz.serve.replies import streamed
from khaosz.serve.schema import ChatRequest
from khaosz.serve.translation import function_tool, text_content, translated_chat

_SAME = {
    "model", "parallel_tool_calls", "truncation", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "seed", "stream", "knowledge_base", "retrieval", "chat_template_kwargs",
    "thinking_budget",
}  # fmt: skip


def response_routes(answering: Answering) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/responses",
        responses={**streamed(ResponseReply), **errors(400, 404, 409, 503, 504)},
        response_model=None,
    )
    async def respond(request: ResponseRequest, raw_request: Request) -> Response:
        """Answer a list of items, as OpenAI's Responses API does."""
        layout = ResponseLayout(request)
        return await answering.chat(chat_of(request), raw_request, layout)

    @router.post(
        "/v1/responses/input_tokens",
        response_model=InputCount,
        responses=errors(400, 404, 503),
    )
    async def count(request: InputCountRequest) -> dict[str, Any]:
        """The tokens of a request."""
        tokens = await answering.count(chat_of(request))
        return {"object": "response.input_tokens", "input_tokens": tokens}

    @router.get("/v1/responses/{response}", response_model=None, responses=errors(404))
    @router.delete("/v1/responses/{response}", response_model=None, responses=errors(404))
    async def stored(response: str) -> None:
        """Nothing is stored."""
        raise ApiError(404, f"response {response!r} not found: this server stores no responses")

    return router


def chat_of(request: InputCountRequest) -> ChatRequest:
    """Raises `ApiError` for fields that do not go together."""
    values = request.model_dump(include=_SAME, exclude_none=True)
    values["messages"] = list(messages_of(request))
    if request.reasoning is not None:
        values["reasoning_effort"] = request.reasoning.effort
    values["tools"] = [
        function_tool(tool.name, tool.description, tool.parameters) for tool in request.tools or ()
    ] or None
    match request.tool_choice:
        case NamedFunction(name=name):
            values["tool_choice"] = {"type": "function", "function": {"name": name}}
        case AllowedFunctions(mode=mode, tools=tools):
            names = [{"type": "function", "function": {"name": tool.name}} for tool in tools]
            allowed = {"mode": mode, "tools": names}
            values["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        case choice:
            values["tool_choice"] = choice
    if request.text is not None and request.text.format is not None:
        values["response_format"] = _format(request.text.format)
    if isinstance(request, ResponseRequest):
        values["max_tokens"] = request.max_output_tokens
        values["logprobs"] = request.logprobs
        values["top_logprobs"] = request.top_logprobs if request.logprobs else None
    return translated_chat(values)


def _format(format: Any) -> dict[str, Any]:
    body: dict[str, Any] = format.model_dump(by_alias=True, exclude_none=True)
    if isinstance(format, JsonSchemaFormat):
        kind = body.pop("type")
        return {"type": kind, "json_schema": body}
    return body


def messages_of(request: InputCountRequest) -> Iterable[dict[str, Any]]:
    """The messages of a chat. Reasoning, text and calls that follow one another in this order are
    one message of the assistant."""
    if request.instructions:
        yield {"role": "system", "content": request.instructions}
    if isinstance(request.input, str):
        yield {"role": "user", "content": request.input}
        return
    assistant: dict[str, Any] = {}
    for item in request.input:
        part = _assistant_part(item)
        if part is None or not _continues(assistant, part):
            if assistant:
                yield {"role": "assistant", "content": None, **assistant}
            assistant = {}
        if part is not None:
            calls = [*assistant.get("tool_calls", ()), *part.get("tool_calls", ())]
            assistant |= {**part, "tool_calls": calls} if calls else part
        elif isinstance(item, FunctionCallOutputItem):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
        elif isinstance(item, InputMessageItem):
            yield {"role": item.role, "content": _text(item.content)}
    if assistant:
        yield {"role": "assistant", "content": None, **assistant}


def _continues(assistant: dict[str, Any], part: dict[str, Any]) -> bool:
    """Whether a part belongs to the message before it."""
    if "reasoning_content" in part:
        return not assistant
    return "tool_calls" in part or not assistant.keys() & {"content", "tool_calls"}


def _assistant_part(item: Item) -> dict[str, Any] | None:
    match item:
        case OutputMessageItem():
            return {"content": _text(item.content)}
        case FunctionCallItem():
            function = {"name": item.name, "arguments": item.arguments}
            return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
        case ReasoningInputItem():
            texts = [part.text for part in item.content or item.summary]
            return {"reasoning_content": "\n".join(texts)}
    return None


def _text(content: Any) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    return text_content([part.text for part in content if not isinstance(part, RefusalPart)])
