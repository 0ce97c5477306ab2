"""Answers in the layouts of OpenAI's chats and completions: whole, or as server-sent events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from khaosz.inference.parts import Part, ToolCall
from khaosz.inference.request import Logprob
from khaosz.serve.answering import Answer, Piece
from khaosz.serve.errors import ApiError

COMMENT = ": waiting\n\n"  # clients skip it
DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """One server-sent event. JSON has no bare line breaks, so it is one data line."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class CompletionLayout:
    """Of one answer to a chat or a completion."""

    media_type = "text/event-stream"

    def __init__(self, *, chat: bool, include_usage: bool = False) -> None:
        self._chat, self._include_usage = chat, include_usage
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._calls: dict[int, int] = {}  # by choice

    async def whole(self, answer: Answer) -> dict[str, Any] | None:
        pieces = await answer.collected()
        if pieces is None:
            return None
        choices = [
            {
                "index": index,
                "finish_reason": piece.reason,
                "logprobs": self._logprobs(answer, piece.logprobs),
                **self._message(answer, piece),
            }
            for index, piece in pieces.items()
        ]
        kind = "chat.completion" if self._chat else "text_completion"
        body = {**self._head(answer), "object": kind, "choices": choices}
        return {**body, "usage": answer.usage.body(), **answer.prompt_fields()}

    async def events(self, answer: Answer) -> AsyncIterator[str]:
        """Chunks and `[DONE]`."""
        started: set[int] = set()
        usage = {"usage": None} if self._include_usage else {}
        prompt_fields = answer.prompt_fields()  # in the first chunk only
        async for piece in answer.pieces():
            for choice in self._chunk_choices(answer, piece, piece.choice not in started):
                yield event(self._chunk(answer, [choice], {**usage, **prompt_fields}))
                prompt_fields = {}
            started.add(piece.choice)
        if self._include_usage:
            yield event(self._chunk(answer, [], {"usage": answer.usage.body()}))
        yield DONE

    def waiting(self) -> str:
        return COMMENT

    def failed(self, error: ApiError) -> str:
        return event(error.body)

    def _head(self, answer: Answer) -> dict[str, Any]:
        return {"id": self._id, "created": answer.created, "model": answer.model}

    def _message(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        texts = {
            kind: "".join(
                part.text for part in piece.parts if isinstance(part, Part) and part.kind == kind
            )
            for kind in ("content", "reasoning")
        }
        if not self._chat:
            return {"text": texts["content"]}
        calls = [part.body() for part in piece.parts if isinstance(part, ToolCall)]
        content = texts["content"] or (None if calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["tool_calls"] = calls
        return {"message": {**message, **answer.citations(piece.choice)}}

    def _chunk(
        self, answer: Answer, choices: list[dict[str, Any]], more: dict[str, Any]
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head(answer), "object": kind, "choices": choices, **more}

    def _chunk_choices(self, answer: Answer, piece: Piece, first: bool) -> list[dict[str, Any]]:
        """The chunks' choices for one piece: role, deltas, finish reason. There is none while text
        is held back, unless it has log-probabilities."""
        deltas = self._deltas(piece.parts, piece.choice)
        logprobs = self._logprobs(answer, piece.logprobs)
        if logprobs and logprobs["content"] and not deltas:
            deltas = [{"content": ""}]
        chunks = []
        if first and self._chat:
            chunks.append(self._choice(piece.choice, {"role": "assistant", "content": ""}))
        for at, delta in enumerate(deltas):
            chunks.append(self._choice(piece.choice, delta, None if at else logprobs))
        if piece.reason is not None:
            last = answer.citations(piece.choice)
            chunks.append(self._choice(piece.choice, last, reason=piece.reason))
        return chunks

    def _deltas(self, parts: Sequence[Part | ToolCall], choice: int) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, ToolCall):
                index = self._calls.get(choice, 0)
                self._calls[choice] = index + 1
                deltas.append({"tool_calls": [{"index": index, **part.body()}]})
            else:
                key = "content" if part.kind == "content" else "reasoning_content"
                deltas.append({key: part.text})
        return deltas

    def _choice(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        content = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, answer: Answer, values: Sequence[Logprob]) -> dict[str, Any] | None:
        if not answer.format.logprobs:
            return None
        return {"content": answer.logprobs(values), "refusal": None}
