"""Outputs of the engine in OpenAI's layout: whole, or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import KhaoszError
from khaosz.inference.request import Logprob, Output
from khaosz.serve.worker import Failed

DONE = "data: [DONE]\n\n"


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    # It may repeat what was sent, which may be long.
    message = message if len(message) <= 1000 else message[:1000] + "..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: dict[str, Any]) -> str:
    """One server-sent event. JSON has no bare line breaks, so one data line holds it."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


@dataclass
class Usage:
    """Tokens of a request, from what its outputs say so far."""

    prompt: int = 0
    cached: int = 0
    generated: dict[int, int] = field(default_factory=dict)  # by choice

    def count(self, output: Output) -> None:
        self.prompt = output.prompt_tokens
        self.cached = max(self.cached, output.cached_tokens)
        self.generated[output.choice] = output.generated

    def body(self) -> dict[str, Any]:
        answered = sum(self.generated.values())
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": answered,
            "total_tokens": self.prompt + answered,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Answer:
    """How one request is answered. `chat` chooses between the two layouts."""

    def __init__(
        self, chat: bool, model: str, tokenizer: Tokenizer, ends: set[int], logprobs: bool
    ) -> None:
        self.chat, self.tokenizer, self.ends, self.logprobs = chat, tokenizer, ends, logprobs
        name = "chatcmpl" if chat else "cmpl"
        self._head = {
            "id": f"{name}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, outputs: AsyncIterator[Output]) -> dict[str, Any] | None:
        """The answer when all of it is there; None if the client left before."""
        usage = Usage()
        choices: dict[int, list[Output]] = {}
        async for output in outputs:
            usage.count(output)
            choices.setdefault(output.choice, []).append(output)
        if not choices or any(parts[-1].finish_reason is None for parts in choices.values()):
            return None
        return {
            **self._head,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [self._choice(index, choices[index]) for index in sorted(choices)],
            "usage": usage.body(),
        }

    async def events(
        self, outputs: AsyncIterator[Output], include_usage: bool
    ) -> AsyncIterator[str]:
        """Chunks as they come, and `[DONE]`; an error that comes amid them is the last event."""
        usage = Usage()
        begun: set[int] = set()
        try:
            async for output in outputs:
                usage.count(output)
                first = output.choice not in begun
                begun.add(output.choice)
                for choice in self._pieces(output, first):
                    yield event(self._chunk([choice], {"usage": None} if include_usage else {}))
        except Failed:
            yield event(error_body("the answer failed", "server_error"))
            return
        except KhaoszError as error:
            yield event(error_body(str(error), "server_error"))
            return
        if include_usage:
            yield event(self._chunk([], {"usage": usage.body()}))
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **more}

    def _choice(self, index: int, parts: Sequence[Output]) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        choice: dict[str, Any] = {"index": index, "finish_reason": parts[-1].finish_reason}
        choice["logprobs"] = self._logprobs([each for part in parts for each in part.logprobs])
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return choice

    def _pieces(self, output: Output, first: bool) -> list[dict[str, Any]]:
        """The choices that stand in chunks for one output: who speaks, what is said, why it ended.
        Text that is held back for now leaves none."""
        pieces = []
        if first and self.chat:
            pieces.append(self._piece(output.choice, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs(output.logprobs)
        if output.text or (logprobs and logprobs["content"]):
            said: dict[str, str] | str
            said = {"content": output.text} if self.chat else output.text
            pieces.append(self._piece(output.choice, said, logprobs))
        if output.finish_reason is not None:
            nothing: dict[str, str] | str = {} if self.chat else ""
            pieces.append(self._piece(output.choice, nothing, reason=output.finish_reason))
        return pieces

    def _piece(
        self,
        index: int,
        said: dict[str, str] | str,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        key = "delta" if self.chat else "text"
        return {"index": index, key: said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, values: Sequence[Logprob]) -> dict[str, Any] | None:
        """Of the tokens that make text: the one that ends the turn isn't shown."""
        if not self.logprobs:
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
