"""An answer in the layout of Ollama's API: one object, or one a line."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from khaosz.inference.parts import Part, ToolCall
from khaosz.serve.answering import Answer, Piece
from khaosz.serve.errors import ApiError
from khaosz.serve.translation import arguments_of


def now() -> str:
    return datetime.now(UTC).isoformat()


class OllamaLayout:
    """Of one answer to a chat, or to a prompt to continue."""

    media_type = "application/x-ndjson"

    def __init__(self, model: str, *, chat: bool) -> None:
        self._model, self._chat = model, chat

    def waiting(self) -> str:
        """JSON lines have no comments: a piece without text."""
        return self.line(self._body([], done=False))

    async def whole(self, answer: Answer) -> dict[str, Any] | None:
        pieces = await answer.collected()
        if pieces is None:
            return None
        return {**self._body(pieces[0].parts, done=True), **self._ended(answer, pieces[0])}

    async def events(self, answer: Answer) -> AsyncIterator[str]:
        async for piece in answer.pieces():
            logprobs = self._logprobs(answer, piece)
            for part in piece.parts or ([Part("content", "")] if logprobs else []):
                yield self.line({**self._body([part], done=False), **logprobs})
                logprobs = {}
            if piece.reason is not None:
                end = {**self._ended(answer, piece), "logprobs": None}
                body = {**self._body([], done=True), **end}
                yield self.line({key: value for key, value in body.items() if value is not None})

    def failed(self, error: ApiError) -> str:
        return self.line(error.body_for("/api/"))

    def loaded(self, seconds: float) -> dict[str, Any]:
        """The answer to a request without a prompt, which loads the model."""
        times = {"total_duration": nanoseconds(seconds), "load_duration": nanoseconds(seconds)}
        return {**self._body([], done=True), "done_reason": "load", **times}

    def line(self, body: dict[str, Any]) -> str:
        return json.dumps(body, ensure_ascii=False) + "\n"

    def _body(self, parts: list[Part | ToolCall], *, done: bool) -> dict[str, Any]:
        texts = {"content": "", "reasoning": ""}
        calls = []
        for part in parts:
            if isinstance(part, ToolCall):
                function = {"name": part.name, "arguments": arguments_of(part)}
                calls.append({"id": part.id, "function": function})
            else:
                texts[part.kind] += part.text
        thinking = {"thinking": texts["reasoning"]} if texts["reasoning"] else {}
        head = {"model": self._model, "created_at": now(), "done": done}
        if not self._chat:
            return {**head, "response": texts["content"], **thinking}
        message = {"role": "assistant", "content": texts["content"], **thinking}
        return {**head, "message": {**message, "tool_calls": calls} if calls else message}

    def _ended(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        end, times, used = time.perf_counter(), answer.times, answer.usage
        first = end if used.first is None else used.first
        return {
            "done_reason": "length" if piece.reason == "length" else "stop",
            "total_duration": nanoseconds(end - times.arrived),
            "load_duration": nanoseconds(times.loaded - times.arrived),
            "prompt_eval_count": used.prompt,
            "prompt_eval_duration": nanoseconds(first - times.started),
            "eval_count": sum(used.generated.values()),
            "eval_duration": nanoseconds(end - first),
            **self._logprobs(answer, piece),
            **answer.citations(0),
            **answer.prompt_fields(),
        }

    def _logprobs(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        if not (answer.format.logprobs and piece.logprobs):
            return {}
        return {"logprobs": answer.logprobs(piece.logprobs)}


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
