"""An answer in the layout of OpenAI's Responses API: items, whole or as typed events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from khaosz.inference.parts import ToolCall
from khaosz.serve.answering import Answer, Piece
from khaosz.serve.errors import ApiError
from khaosz.serve.openai.completion_output import COMMENT
from khaosz.serve.openai.response_schema import ResponseRequest

_CODES = {400: "invalid_prompt", 503: "rate_limit_exceeded"}
Event = tuple[str, dict[str, Any]]  # type and fields


class ResponseLayout:
    """Of one answer to `request`."""

    media_type = "text/event-stream"

    def __init__(self, request: ResponseRequest) -> None:
        self._request = request
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
        }
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the last item, while it grows
        self._sent = 0

    async def whole(self, answer: Answer) -> dict[str, Any] | None:
        pieces = await answer.collected()
        if pieces is None:
            return None
        for _ in self._item_events(answer, pieces[0]):
            pass
        return self._ended(answer, pieces[0])

    async def events(self, answer: Answer) -> AsyncIterator[str]:
        for line in self._begin():
            yield line
        async for piece in answer.pieces():
            for event in self._item_events(answer, piece):
                yield self._line(*event)
            if piece.reason is not None:
                response = self._ended(answer, piece)
                yield self._line(f"response.{response['status']}", {"response": response})

    def waiting(self) -> str:
        return COMMENT

    def failed(self, error: ApiError) -> str:
        lines = [] if self._sent else [*self._begin()]
        code = _CODES.get(error.status, "server_error")
        message = error.body["error"]["message"]
        response = self._response("failed", error={"code": code, "message": message})
        return "".join([*lines, self._line("response.failed", {"response": response})])

    def _begin(self) -> Iterator[str]:
        response = self._response("in_progress")
        yield self._line("response.created", {"response": response})
        yield self._line("response.in_progress", {"response": response})

    def _line(self, kind: str, fields: dict[str, Any]) -> str:
        body = {"type": kind, "sequence_number": self._sent, **fields}
        self._sent += 1
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"

    # ------------------------------------------------------------------------------------- items

    def _item_events(self, answer: Answer, piece: Piece) -> Iterator[Event]:
        logprobs = answer.logprobs(piece.logprobs) if self._request.logprobs else []
        for part in piece.parts:
            if isinstance(part, ToolCall):
                yield from self._close("completed")
                yield from self._call(part)
            else:
                kind = "message" if part.kind == "content" else "reasoning"
                yield from self._append(kind, part.text, logprobs)
                if kind == "message":
                    logprobs = []  # of all of its text in this piece
        if piece.reason is not None:
            if not self._output:
                yield from self._append("message", "", [])
            yield from self._close("incomplete" if piece.reason == "length" else "completed")

    def _append(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        message = kind == "message"
        if self._open is None or self._open["type"] != kind:
            yield from self._close("completed")
            yield from self._open_item(kind)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        more = {}
        if message:
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        if text or logprobs:
            name = "output_text" if message else "reasoning_text"
            yield f"response.{name}.delta", {**self._place(), "delta": text, **more}

    def _open_item(self, kind: str) -> Iterator[Event]:
        if kind == "message":
            head: dict[str, Any] = {"id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            part: dict[str, Any] = {
                "type": "output_text", "text": "", "annotations": [], "logprobs": [],
            }  # fmt: skip
        else:
            head = {"id": f"rs_{secrets.token_hex(12)}", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        item = {"type": kind, "status": "in_progress", **head, "content": []}
        self._output.append(item)
        self._open = item
        yield "response.output_item.added", {"output_index": self._index, "item": dict(item)}
        item["content"] = [part]
        yield "response.content_part.added", {**self._place(), "part": dict(part)}

    def _close(self, status: str) -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        part = item["content"][0]
        message = item["type"] == "message"
        item["status"] = status
        name = "output_text" if message else "reasoning_text"
        more = {"logprobs": part["logprobs"]} if message else {}
        yield f"response.{name}.done", {**self._place(), "text": part["text"], **more}
        yield "response.content_part.done", {**self._place(), "part": part}
        yield "response.output_item.done", {"output_index": self._index, "item": item}
        self._open = None

    def _call(self, call: ToolCall) -> Iterator[Event]:
        item = {
            "type": "function_call", "id": f"fc_{secrets.token_hex(12)}", "status": "in_progress",
            "call_id": call.id, "name": call.name, "arguments": "",
        }  # fmt: skip
        self._output.append(item)
        place = {"output_index": self._index, "item_id": item["id"]}
        kind = "response.function_call_arguments"
        yield "response.output_item.added", {"output_index": self._index, "item": dict(item)}
        yield f"{kind}.delta", {**place, "delta": call.arguments}
        yield f"{kind}.done", {**place, "name": call.name, "arguments": call.arguments}
        item |= {"status": "completed", "arguments": call.arguments}
        yield "response.output_item.done", {"output_index": self._index, "item": item}

    @property
    def _index(self) -> int:
        return len(self._output) - 1

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"output_index": self._index, "item_id": self._open["id"], "content_index": 0}

    # ----------------------------------------------------------------------------------- response

    def _ended(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        cut = piece.reason == "length"
        reasoning = [item for item in self._output if item["type"] == "reasoning"]
        texts = [item["content"][0]["text"] for item in reasoning]
        used = answer.usage.body()
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {**used["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": sum(len(answer.tokenizer.encode(text)) for text in texts)
            },
            "total_tokens": used["total_tokens"],
        }
        return {
            **self._response(
                "incomplete" if cut else "completed",
                completed_at=None if cut else int(time.time()),
                incomplete_details={"reason": "max_output_tokens"} if cut else None,
                usage=usage,
            ),
            **answer.citations(0),
            **answer.prompt_fields(),
        }

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        request = self._request
        text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
        tools = [tool.model_dump(exclude_unset=True) for tool in request.tools or ()]
        choice = request.tool_choice
        if choice is not None and not isinstance(choice, str):
            choice = choice.model_dump()  # type: ignore[assignment]
        reasoning = request.reasoning
        return {
            **self._head,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": list(self._output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": choice or "auto",
            "tools": tools,
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None,
            **more,
        }
