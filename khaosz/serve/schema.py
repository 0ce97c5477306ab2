"""What may be asked, as OpenAI's interface spells it.

Fields are closed and types strict: what isn't listed here is an error that names it. Ranges that
`SamplingParams` checks aren't checked twice.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from khaosz.inference.sampling import SamplingParams

MAX_MESSAGES = 4096
ANSWER = 1024  # tokens of an answer at most, where the request doesn't say


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Asked):
    type: Literal["text"]
    text: str


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]

    def for_template(self) -> dict[str, str]:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Asked):
    include_usage: bool = False


class PlainText(Asked):
    type: Literal["text"]


class JsonObject(Asked):
    type: Literal["json_object"]


class Schema(Asked):
    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # an answer fits its schema in either case


class JsonSchema(Asked):
    type: Literal["json_schema"]
    json_schema: Schema


class Sampled(Asked):
    """What completions and chats share."""

    model: str
    max_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self) -> SamplingParams:
        """Raises `GenerationError` for a value out of range."""
        return self._params(self.max_tokens)

    def _params(self, max_tokens: int | None, **more: Any) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return SamplingParams(
            max_tokens=ANSWER if max_tokens is None else max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            n=1 if self.n is None else self.n,
            stop=tuple(stop or ()),
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_biases(self.logit_bias or {}),
            **more,
        )


class CompletionRequest(Sampled):
    prompt: str | list[int]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: (
        Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None
    ) = None

    @model_validator(mode="after")
    def _fields_that_go_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one and the same: give one")
        return self

    def params(self) -> SamplingParams:
        given = self.max_completion_tokens
        return self._params(
            self.max_tokens if given is None else given,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self._json_schema(),
        )

    def _json_schema(self) -> str | None:
        match self.response_format:
            case JsonObject():
                return '{"type": "object"}'
            case JsonSchema(json_schema=asked):
                return json.dumps(asked.schema_)
        return None


def _biases(given: dict[str, float]) -> dict[int, float]:
    """Keys as token ids; one that is none becomes -1, which the engine refuses."""
    return {int(key) if key.isdecimal() and len(key) < 10 else -1: b for key, b in given.items()}
