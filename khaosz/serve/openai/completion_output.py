"""Outputs of the engine in OpenAI's layout: whole, or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import KhaoszError
from khaosz.inference.parts import Calls, Part, PartStream, ToolCall
from khaosz.inference.request import Logprob, Output
from khaosz.rag.answer import CitationStream
from khaosz.serve.errors import TOO_LATE, error_body
from khaosz.serve.metrics import Usage
from khaosz.serve.worker import Failed

if TYPE_CHECKING:
    from khaosz.serve.knowledge.grounding import RetrievalContext

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """One server-sent event. JSON has no bare line breaks, so one data line holds it."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


@dataclass(frozen=True)
class ResponseFormat:
    """How a request's answer is taken apart and shown. `chat` chooses between the two layouts;
    `calls` is how this model writes calls of tools, `thinking` that its prompt has opened the
    reasoning, `one_call` that further calls are left out, `grounds` what the answer cites."""

    chat: bool
    logprobs: bool = False
    calls: Calls = "none"
    thinking: bool = False
    one_call: bool = False
    grounds: RetrievalContext | None = None


class Choice:
    """One choice as it comes: outputs in, pieces of a message out."""

    def __init__(self, form: ResponseFormat) -> None:
        self._form = form
        self._parts = PartStream(form.calls, thinking=form.thinking) if form.chat else None
        grounds = form.grounds
        self._cites = CitationStream(len(grounds.passages)) if grounds else None
        self.calls = 0

    def take(self, output: Output) -> tuple[list[dict[str, Any]], str | None]:
        """Deltas, and why the choice ended."""
        reason = output.finish_reason
        if self._parts is None:
            return ([{"content": output.text}] if output.text else []), reason
        found = self._parts.feed(output.text)
        if reason is not None:
            found += self._parts.finish()
        deltas = [delta for part in found for delta in self._delta(part)]
        if reason is not None:
            deltas += self._held_back()
        return deltas, "tool_calls" if self.calls and reason == "stop" else reason

    def _delta(self, part: Part | ToolCall) -> list[dict[str, Any]]:
        if isinstance(part, ToolCall):
            if self.calls and self._form.one_call:
                return []
            self.calls += 1
            call = {"index": self.calls - 1, **part.body()}
            return [*self._held_back(), {"tool_calls": [call]}]
        if part.kind == "reasoning":
            return [{"reasoning_content": part.text}]
        text = self._cites.feed(part.text) if self._cites else part.text
        return [{"content": text}] if text else []

    def _held_back(self) -> list[dict[str, Any]]:
        """Text that might have become a marker."""
        text = self._cites.finish() if self._cites else ""
        return [{"content": text}] if text else []

    def cited(self) -> dict[str, Any]:
        """What is said of the passages when the choice has ended."""
        if self._cites is None or self._form.grounds is None:
            return {}
        return {"citations": self._form.grounds.cited(self._cites.used)}


class Answer:
    """How one request is answered: whole or as events."""

    def __init__(
        self, form: ResponseFormat, model: str, tokenizer: Tokenizer, ends: set[int]
    ) -> None:
        self.form, self.tokenizer, self.ends = form, tokenizer, ends
        self.usage = Usage()
        self._choices: dict[int, Choice] = {}
        self._head = {
            "id": f"{'chatcmpl' if form.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, outputs: AsyncIterator[Output]) -> dict[str, Any] | None:
        """The answer when all of it is there; None if the client left before."""
        said: dict[int, list[dict[str, Any]]] = {}
        logprobs: dict[int, list[Logprob]] = {}
        reasons: dict[int, str | None] = {}
        async for output in outputs:
            deltas, reasons[output.choice] = self._take(output)
            said.setdefault(output.choice, []).extend(deltas)
            logprobs.setdefault(output.choice, []).extend(output.logprobs)
        if not reasons or None in reasons.values():
            return None
        choices = [
            {
                "index": index,
                "finish_reason": reasons[index],
                "logprobs": self._logprobs(logprobs[index]),
                **self._message(index, said[index]),
            }
            for index in sorted(reasons)
        ]
        kind = "chat.completion" if self.form.chat else "text_completion"
        body = {**self._head, "object": kind, "choices": choices, "usage": self.usage.body()}
        return {**body, **self._retrieval()}

    async def events(
        self, outputs: AsyncIterator[Output], include_usage: bool
    ) -> AsyncIterator[str]:
        """Chunks as they come, and `[DONE]`; an error that comes amid them is the last event."""
        begun: set[int] = set()
        usage = {"usage": None} if include_usage else {}
        first_of_all = self._retrieval()
        try:
            async for output in outputs:
                first = output.choice not in begun
                begun.add(output.choice)
                for choice in self._pieces(output, first):
                    yield event(self._chunk([choice], {**usage, **first_of_all}))
                    first_of_all = {}
        except Failed:
            yield event(error_body("the answer failed", "server_error"))
            return
        except TimeoutError:
            yield event(error_body(TOO_LATE, "server_error", code="request_timeout"))
            return
        except KhaoszError as error:
            yield event(error_body(str(error), "server_error"))
            return
        if include_usage:
            yield event(self._chunk([], {"usage": self.usage.body()}))
        yield DONE

    def _take(self, output: Output) -> tuple[list[dict[str, Any]], str | None]:
        self.usage.count(output)
        if output.choice not in self._choices:
            self._choices[output.choice] = Choice(self.form)
        return self._choices[output.choice].take(output)

    def _retrieval(self) -> dict[str, Any]:
        grounds = self.form.grounds
        return {"retrieval": grounds.body()} if grounds else {}

    def _message(self, index: int, deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts = {
            key: "".join(delta[key] for delta in deltas if key in delta)
            for key in ("content", "reasoning_content")
        }
        if not self.form.chat:
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
        return {"message": {**message, **self._choices[index].cited()}}

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.form.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **more}

    def _pieces(self, output: Output, first: bool) -> list[dict[str, Any]]:
        """The choices that stand in chunks for one output: who speaks, what is said, why it ended.
        Text that is held back for now leaves none, unless it has log-probabilities."""
        deltas, reason = self._take(output)
        logprobs = self._logprobs(output.logprobs)
        if logprobs and logprobs["content"] and not deltas:
            deltas = [{"content": ""}]
        pieces = []
        if first and self.form.chat:
            pieces.append(self._piece(output.choice, {"role": "assistant", "content": ""}))
        for at, delta in enumerate(deltas):
            pieces.append(self._piece(output.choice, delta, None if at else logprobs))
        if reason is not None:
            ended = self._choices[output.choice].cited()
            pieces.append(self._piece(output.choice, ended, reason=reason))
        return pieces

    def _piece(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        said = {"delta": delta} if self.form.chat else {"text": delta.get("content", "")}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, values: Sequence[Logprob]) -> dict[str, Any] | None:
        """Of the tokens that make text: the one that ends the turn isn't shown."""
        if not self.form.logprobs:
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
        # A padded vocabulary's rows stand for nothing, and JSON has no infinity.
        raw = self.tokenizer.token_bytes(token)
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(raw)}
