"""An answer in the layout of Anthropic's Messages API: content blocks, whole or as events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from khaosz.inference.parts import Part, ToolCall
from khaosz.serve.answering import Answer, Piece
from khaosz.serve.errors import ApiError
from khaosz.serve.translation import arguments_of

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {body['type']}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


class MessageLayout:
    """Of one answer."""

    media_type = "text/event-stream"

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._index = -1  # of the last block
        self._open: str | None = None  # the kind of a block that grows

    async def whole(self, answer: Answer) -> dict[str, Any] | None:
        pieces = await answer.collected()
        if pieces is None:
            return None
        blocks: list[dict[str, Any]] = []
        for part in pieces[0].parts:
            if isinstance(part, ToolCall):
                blocks.append({**_tool_use(part), "input": arguments_of(part)})
                continue
            block = _block(part.kind)
            if not blocks or blocks[-1]["type"] != block["type"]:
                blocks.append(block)
            blocks[-1][_field(part.kind)] += part.text
        return {
            **self._head,
            "content": blocks or [_block("content")],
            **_stop(pieces[0]),
            "usage": _usage(answer),
            **answer.citations(0),
            **answer.prompt_fields(),
        }

    async def events(self, answer: Answer) -> AsyncIterator[str]:
        usage = {
            "input_tokens": answer.prompt_tokens,
            "output_tokens": 0,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        yield event({"type": "message_start", "message": {**message, "usage": usage}})
        async for piece in answer.pieces():
            for part in piece.parts:
                for each in self._part_events(part):
                    yield event(each)
            if piece.reason is None:
                continue
            if self._index < 0:
                yield event(self._start("content", _block("content")))
            for each in self._stop_block():
                yield event(each)
            more = {**answer.citations(0), **answer.prompt_fields()}
            end = {"type": "message_delta", "delta": _stop(piece), "usage": _usage(answer)}
            yield event({**end, **more})
            yield event({"type": "message_stop"})

    def waiting(self) -> str:
        return event({"type": "ping"})

    def failed(self, error: ApiError) -> str:
        return event(error.body_for("/v1/messages"))

    def _part_events(self, part: Part | ToolCall) -> Iterator[dict[str, Any]]:
        if isinstance(part, ToolCall):
            yield from self._stop_block()
            yield self._start("call", {**_tool_use(part), "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})
            yield from self._stop_block()
            return
        if self._open != part.kind:
            yield from self._stop_block()
            yield self._start(part.kind, _block(part.kind))
        field = _field(part.kind)
        yield self._delta({"type": f"{field}_delta", field: part.text})

    def _start(self, kind: str, block: dict[str, Any]) -> dict[str, Any]:
        self._index += 1
        self._open = kind
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop_block(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None


def _block(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": "", "citations": None}


def _field(kind: str) -> str:
    return "thinking" if kind == "reasoning" else "text"


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _stop(piece: Piece) -> dict[str, Any]:
    assert piece.reason is not None
    reason = _REASONS[piece.reason]
    if piece.reason == "stop" and piece.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": piece.stop}


def _usage(answer: Answer) -> dict[str, int]:
    used = answer.usage
    return {
        "input_tokens": used.prompt - used.cached,
        "output_tokens": sum(used.generated.values()),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached,
    }
