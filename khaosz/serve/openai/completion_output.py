"""The engine's output in OpenAI's layout: whole, or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import KhaoszError
from khaosz.inference.parts import Calls, Part, PartStream, ToolCall
from khaosz.inference.request import Logprob, Output
from khaosz.rag.answer import CitationStream
from khaosz.serve.errors import ApiError, as_api_error
from khaosz.serve.knowledge.grounding import RetrievalContext
from khaosz.serve.metrics import Usage
from khaosz.serve.worker import Failed

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """One server-sent event. JSON has no bare line breaks, so it is one data line."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


@dataclass(frozen=True)
class ResponseFormat:
    """How the model's text is parsed and formatted. `chat` chooses between the two layouts;
    `calls`: how this model writes tool calls; `reasoning`: the prompt has opened the reasoning;
    `one_call`: further calls are dropped; `context`: what the answer may cite; `left_out`: messages
    that the model does not see, None where the request does not allow it."""

    chat: bool
    logprobs: bool = False
    calls: Calls = "none"
    reasoning: bool = False
    one_call: bool = False
    context: RetrievalContext | None = None
    left_out: int | None = None


class Choice:
    """One choice of an answer: engine outputs in, deltas of a message out."""

    def __init__(self, format: ResponseFormat) -> None:
        self._format = format
        self._parts = PartStream(format.calls, thinking=format.reasoning) if format.chat else None
        context = format.context
        self._citations = CitationStream(len(context.passages)) if context else None
        self.calls = 0

    def take(self, output: Output) -> tuple[list[dict[str, Any]], str | None]:
        """Deltas, and why the choice ended."""
        reason = output.finish_reason
        if self._parts is None:
            return ([{"content": output.text}] if output.text else []), reason
        parts = self._parts.feed(output.text)
        if reason is not None:
            parts += self._parts.finish(cut=reason == "length")
        deltas = [delta for part in parts for delta in self._delta(part)]
        if reason is not None:
            deltas += self._held_back()
        return deltas, "tool_calls" if self.calls and reason == "stop" else reason

    def _delta(self, part: Part | ToolCall) -> list[dict[str, Any]]:
        if isinstance(part, ToolCall):
            if self.calls and self._format.one_call:
                return []
            self.calls += 1
            call = {"index": self.calls - 1, **part.body()}
            return [*self._held_back(), {"tool_calls": [call]}]
        if part.kind == "reasoning":
            return [{"reasoning_content": part.text}]
        text = self._citations.feed(part.text) if self._citations else part.text
        return [{"content": text}] if text else []

    def _held_back(self) -> list[dict[str, Any]]:
        """Text that was held back because it might have become a citation."""
        text = self._citations.finish() if self._citations else ""
        return [{"content": text}] if text else []

    def citations(self) -> dict[str, Any]:
        """The citations, when the choice has ended."""
        if self._citations is None or self._format.context is None:
            return {}
        return {"citations": self._format.context.citations(self._citations.used)}


class Answer:
    """The answer to one request: whole or as events."""

    def __init__(
        self, format: ResponseFormat, model: str, tokenizer: Tokenizer, ends: set[int]
    ) -> None:
        self.format, self.tokenizer, self.ends = format, tokenizer, ends
        self.usage = Usage()
        self._choices: dict[int, Choice] = {}
        self._head = {
            "id": f"{'chatcmpl' if format.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, outputs: AsyncIterator[Output]) -> dict[str, Any] | None:
        """The complete answer; None if the client left before."""
        messages: dict[int, list[dict[str, Any]]] = {}
        logprobs: dict[int, list[Logprob]] = {}
        reasons: dict[int, str | None] = {}
        async for output in outputs:
            deltas, reasons[output.choice] = self._take(output)
            messages.setdefault(output.choice, []).extend(deltas)
            logprobs.setdefault(output.choice, []).extend(output.logprobs)
        if not reasons or None in reasons.values():
            return None
        choices = [
            {
                "index": index,
                "finish_reason": reasons[index],
                "logprobs": self._logprobs(logprobs[index]),
                **self._message(index, messages[index]),
            }
            for index in sorted(reasons)
        ]
        kind = "chat.completion" if self.format.chat else "text_completion"
        body = {**self._head, "object": kind, "choices": choices, "usage": self.usage.body()}
        return {**body, **self._prompt_fields()}

    async def events(
        self, outputs: AsyncIterator[Output], include_usage: bool
    ) -> AsyncIterator[str]:
        """Chunks and `[DONE]`; an error is the last event."""
        started: set[int] = set()
        usage = {"usage": None} if include_usage else {}
        prompt_fields = self._prompt_fields()  # in the first chunk only
        try:
            async for output in outputs:
                first = output.choice not in started
                started.add(output.choice)
                for choice in self._pieces(output, first):
                    yield event(self._chunk([choice], {**usage, **prompt_fields}))
                    prompt_fields = {}
        except Failed:
            yield event(ApiError(500, "the answer failed").body)
        except TimeoutError as error:
            yield event(as_api_error(error).body)
        except KhaoszError as error:
            yield event(ApiError(500, str(error)).body)
        else:
            if include_usage:
                yield event(self._chunk([], {"usage": self.usage.body()}))
            yield DONE

    def _take(self, output: Output) -> tuple[list[dict[str, Any]], str | None]:
        self.usage.count(output)
        if output.choice not in self._choices:
            self._choices[output.choice] = Choice(self.format)
        return self._choices[output.choice].take(output)

    def _prompt_fields(self) -> dict[str, Any]:
        """What the model got in its prompt, and what it did not."""
        context, left_out = self.format.context, self.format.left_out
        fields = {"retrieval": context.body()} if context else {}
        return fields if left_out is None else {**fields, "left_out": left_out}

    def _message(self, index: int, deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts = {
            key: "".join(delta[key] for delta in deltas if key in delta)
            for key in ("content", "reasoning_content")
        }
        if not self.format.chat:
            return {"text": texts["content"]}
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        content = texts["content"] or (None if calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if texts["reasoning_content"]:
            message["reasoning_content"] = texts["reasoning_content"]
        if calls:
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"} for call in calls
            ]
        return {"message": {**message, **self._choices[index].citations()}}

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.format.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **more}

    def _pieces(self, output: Output, first: bool) -> list[dict[str, Any]]:
        """The chunks' choices for one output: role, deltas, finish reason. There is none while text
        is held back, unless it has log-probabilities."""
        deltas, reason = self._take(output)
        logprobs = self._logprobs(output.logprobs)
        if logprobs and logprobs["content"] and not deltas:
            deltas = [{"content": ""}]
        pieces = []
        if first and self.format.chat:
            pieces.append(self._piece(output.choice, {"role": "assistant", "content": ""}))
        for at, delta in enumerate(deltas):
            pieces.append(self._piece(output.choice, delta, None if at else logprobs))
        if reason is not None:
            last = self._choices[output.choice].citations()
            pieces.append(self._piece(output.choice, last, reason=reason))
        return pieces

    def _piece(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        content = {"delta": delta} if self.format.chat else {"text": delta.get("content", "")}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, values: Sequence[Logprob]) -> dict[str, Any] | None:
        """Without the token that ends the turn, which is not part of the text."""
        if not self.format.logprobs:
            return None
        content = [
            {
                **self._token(each.token, each.value),
                "top_logprobs": [self._token(*pair) for pair in each.top],
            }
            for each in values
            if each.token not in self.ends
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        # The rows that pad a vocabulary have -inf, which JSON lacks.
        raw = self.tokenizer.token_bytes(token)
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(raw)}
