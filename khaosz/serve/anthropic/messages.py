"""Anthropic's Messages API, translated into chats."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from khaosz.data.tokenizer.thinking import SWITCHES
from khaosz.serve.answering import Answering
from khaosz.serve.anthropic.output import MessageLayout
from khaosz.serve.anthropic.schema import (
    AnyMessage,
    AssistantTurn,
    AutoChoice,
    CountRequest,
    MessageReply,
    MessagesError,
    MessagesRequest,
    NamedChoice,
    NoChoice,
    TextBlock,
    ThinkingBlock,
    TokensCount,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from khaosz.serve.errors import errors
from khaosz.serve.replies import streamed
from khaosz.serve.schema import ChatRequest
from khaosz.serve.translation import function_call, function_tool, text_content, translated_chat

_SAME = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed",
    "stream", "knowledge_base", "retrieval", "thinking_budget",
}  # fmt: skip


def message_routes(answering: Answering) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/messages",
        responses={
            **streamed(MessageReply),
            **errors(400, 404, 409, 503, 504, model=MessagesError),
        },
        response_model=None,
    )
    async def create(request: MessagesRequest, raw_request: Request) -> Response:
        """Answer a conversation, as Anthropic's API does."""
        chat, prefill = chat_of(request)
        layout = MessageLayout(request.model)
        return await answering.chat(chat, raw_request, layout, prefill=prefill)

    @router.post(
        "/v1/messages/count_tokens",
        response_model=TokensCount,
        responses=errors(400, 404, 503, model=MessagesError),
    )
    async def count(request: CountRequest) -> dict[str, int]:
        """The tokens of a request."""
        chat, prefill = chat_of(request)
        return {"input_tokens": await answering.count(chat, prefill=prefill)}

    return router


def model_info(card: dict[str, Any]) -> dict[str, Any]:
    """A model as Anthropic's API lists it. `card`: a `ModelCard`."""
    context = card["context"]
    return {
        "id": card["id"],
        "type": "model",
        "display_name": card["id"],
        "created_at": datetime.fromtimestamp(card["created"], UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def chat_of(request: CountRequest) -> tuple[ChatRequest, str]:
    """A chat, and the text that its answer continues: that of a last message of the assistant.
    Raises `ApiError` for fields that do not go together."""
    values = request.model_dump(include=_SAME, exclude_none=True)
    messages, prefill = list(request.messages), ""
    if len(messages) > 1 and isinstance(last := messages[-1], AssistantTurn):
        texts = _texts(last.content)
        if texts is not None:
            prefill = "".join(texts)
            messages.pop()
    values["messages"] = [each for message in messages for each in _translated(message)]
    if request.system:
        content = text_content(_texts(request.system) or [])
        values["messages"].insert(0, {"role": "system", "content": content})
    values["tools"] = [
        function_tool(tool.name, tool.description, tool.input_schema)
        for tool in request.tools or ()
    ] or None
    match request.tool_choice:
        case NamedChoice(name=name):
            values["tool_choice"] = {"type": "function", "function": {"name": name}}
        case AutoChoice(type=kind):
            values["tool_choice"] = "required" if kind == "any" else "auto"
        case NoChoice():
            values["tool_choice"] = "none"
    if getattr(request.tool_choice, "disable_parallel_tool_use", None):
        values["parallel_tool_calls"] = False
    format = request.output_format
    if request.output_config is not None and request.output_config.format is not None:
        format = request.output_config.format
    if format is not None:
        schema = {"name": "output", "schema": format.schema_}
        values["response_format"] = {"type": "json_schema", "json_schema": schema}
    kwargs = {SWITCHES[0]: request.think, **(request.chat_template_kwargs or {})}
    values["chat_template_kwargs"] = kwargs
    if request.think and request.thinking is not None:
        values.setdefault("thinking_budget", request.thinking.budget_tokens)
    if isinstance(request, MessagesRequest):
        values["stop"] = request.stop_sequences or None
    return translated_chat(values), prefill


def _translated(message: AnyMessage) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own, before the text."""
    content = message.content
    blocks = [content] if isinstance(content, str) else content
    texts = [each if isinstance(each, str) else each.text for each in blocks if _is_text(each)]  # type: ignore[union-attr]
    if isinstance(message, AssistantTurn):
        calls = [
            function_call(each.id, each.name, each.input)
            for each in blocks
            if isinstance(each, ToolUseBlock)
        ]
        thoughts = [each.thinking for each in blocks if isinstance(each, ThinkingBlock)]
        answer: dict[str, Any] = {"role": "assistant"}
        answer["content"] = text_content(texts) if texts else None
        answer |= {"tool_calls": calls} if calls else {}
        answer |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
        yield answer
        return
    if isinstance(message, UserTurn):
        for block in blocks:
            if isinstance(block, ToolResultBlock):
                result = _texts(block.content or "") or [""]
                if block.is_error:
                    result[0] = f"Error: {result[0]}"
                yield {
                    "role": "tool",
                    "tool_call_id": block.tool_use_id,
                    "content": text_content(result),
                }
    if texts or not blocks:
        yield {"role": message.role, "content": text_content(texts or [""])}


def _is_text(block: Any) -> bool:
    return isinstance(block, str | TextBlock)


def _texts(content: Any) -> list[str] | None:
    """The texts of a content that has nothing else."""
    if isinstance(content, str):
        return [content]
    return [block.text for block in content] if all(map(_is_text, content)) else None
