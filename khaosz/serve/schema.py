"""What may be asked, as OpenAI's interface spells it.

Fields are closed and types strict: what isn't listed here is an error that names it. Ranges are
those of `SamplingParams`, said once more so that the OpenAPI document has them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from khaosz.inference.sampling import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP,
    MAX_STOPS,
    SamplingParams,
)

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_HITS = 100
ANSWER = 1024  # tokens of an answer at most, where the request doesn't say


class RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]


class FunctionCall(RequestModel):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_json(cls, text: str) -> str:
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ValueError("not a JSON object")
        return text


class Call(RequestModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        # As an object: templates spell it out, and one that is text already would be quoted.
        function = {
            "name": self.function.name,
            "arguments": json.loads(self.function.arguments),
        }
        return {"id": self.id, "type": self.type, "function": function}


class Instruction(RequestModel):
    role: Literal["system", "developer", "user"]
    content: Content

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _text(self.content)}


class Said(RequestModel):
    """By the assistant; `refusal` and `citations` are there so that answers can be sent back as
    they came, and are not told to the model."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[Call], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    refusal: None = None
    citations: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Said:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _text(self.content or "")}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ToolAnswer(RequestModel):
    role: Literal["tool"]
    content: Content
    tool_call_id: str

    def for_template(self) -> dict[str, Any]:
        return {
            "role": "tool",
            "content": _text(self.content),
            "tool_call_id": self.tool_call_id,
        }


Message = Annotated[Instruction | Said | ToolAnswer, Field(discriminator="role")]


class Function(RequestModel):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # calls that are forced fit their schema in either case


class Tool(RequestModel):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        given = self.function
        function: dict[str, Any] = {"name": given.name}
        if given.description is not None:
            function["description"] = given.description
        function["parameters"] = given.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class FunctionName(RequestModel):
    name: str


class ToolChoice(RequestModel):
    type: Literal["function"]
    function: FunctionName


class StreamOptions(RequestModel):
    include_usage: bool = False


class PlainText(RequestModel):
    type: Literal["text"]


class JsonObject(RequestModel):
    type: Literal["json_object"]


class Schema(RequestModel):
    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # an answer fits its schema in either case


class JsonSchema(RequestModel):
    type: Literal["json_schema"]
    json_schema: Schema


class Retrieval(RequestModel):
    """How passages of a knowledge base are found. mode: by words and by meaning where the base has
    an embedder."""

    k: Annotated[int, Field(ge=1, le=MAX_HITS)] = 5
    mode: Literal["lexical", "dense", "hybrid"] | None = None
    reranker: str | None = None


Tokens = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Sampled(RequestModel):
    """What completions and chats share."""

    model: str
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias], Field(max_length=MAX_BIASES)
        ]
        | None
    ) = None
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
            temperature=_or_one(self.temperature),
            top_p=_or_one(self.top_p),
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=_or_one(self.repetition_penalty),
            n=1 if self.n is None else self.n,
            stop=tuple(stop or ()),
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            **more,
        )


class CompletionRequest(Sampled):
    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: (
        Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None
    ) = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    knowledge_base: str | None = None
    retrieval: Retrieval | None = None

    @model_validator(mode="after")
    def _fields_that_go_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one and the same: give one")
        if self.tools is None and (self.tool_choice or self.parallel_tool_calls) is not None:
            raise ValueError("tool_choice and parallel_tool_calls need tools")
        if self.must_call and self._json_schema() is not None:
            raise ValueError("response_format has no say in an answer that must call a tool")
        if self.retrieval is not None and self.knowledge_base is None:
            raise ValueError("retrieval needs knowledge_base")
        if isinstance(self.tool_choice, ToolChoice) and not self.allowed_tools:
            raise ValueError(f"tool_choice names no tool: {self.tool_choice.function.name!r}")
        return self

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    @property
    def allowed_tools(self) -> list[dict[str, Any]]:
        """For the template; none with `tool_choice: none`."""
        tools = [tool.for_template() for tool in self.tools or ()]
        match self.tool_choice:
            case "none":
                return []
            case ToolChoice(function=chosen):
                return [tool for tool in tools if tool["function"]["name"] == chosen.name]
        return tools

    @property
    def one_call(self) -> bool:
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, ToolChoice)

    @property
    def most_tokens(self) -> int | None:
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    def params(self, lark: str | None = None) -> SamplingParams:
        """`lark`: a grammar of the calls that must be made."""
        return self._params(
            self.most_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self._json_schema(),
            lark=lark,
        )

    def _json_schema(self) -> str | None:
        match self.response_format:
            case JsonObject():
                return '{"type": "object"}'
            case JsonSchema(json_schema=asked):
                return json.dumps(asked.schema_)
        return None


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
