"""Request bodies of OpenAI's API.

Types are strict, and an unknown field is an error that names it. Ranges repeat those of
`SamplingParams`, so that the OpenAPI document has them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)

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
DEFAULT_MAX_TOKENS = 1024  # of an answer, where the request sets no limit


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
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return text


class ToolCall(RequestModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        # As an object: templates turn it into JSON themselves, and would quote a text.
        function = {
            "name": self.function.name,
            "arguments": json.loads(self.function.arguments),
        }
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(RequestModel):
    """`name`: of the participant or the tool; few templates read it."""

    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The fields that the request gives, as transformers hands them to the chat template."""
        hidden = {"refusal", "citations", "tool_calls"}
        return self.model_dump(exclude_unset=True, exclude=hidden)


class InputMessage(ChatMessage):
    role: Literal["system", "developer", "user"]
    content: Content

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        return {**super().for_template(), "role": role}


class AssistantMessage(ChatMessage):
    """`refusal` and `citations` exist so that a client can send an answer back unchanged; the model
    does not see them."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    refusal: None = None
    citations: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant message needs content or tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        message = super().for_template()
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ToolMessage(ChatMessage):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[InputMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(RequestModel):
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # forced calls fit their schema in either case


class Tool(RequestModel):
    type: Literal["function"]
    function: Function
    _sent: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, validate: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = validate(value)
        tool._sent = value
        return tool

    def for_template(self) -> dict[str, Any]:
        """As it was sent, in the order of its keys: templates print the whole object."""
        return self._sent


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


class NamedSchema(RequestModel):
    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # the answer fits the schema in either case


class JsonSchema(RequestModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class Retrieval(RequestModel):
    """How passages of a knowledge base are searched. mode: hybrid by default where the base has an
    embedder, lexical otherwise."""

    k: Annotated[int, Field(ge=1, le=MAX_HITS)] = 5
    mode: Literal["lexical", "dense", "hybrid"] | None = None
    reranker: str | None = None


Tokens = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Sampling(RequestModel):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    max_tokens: Tokens | None = None


class SamplingRequest(Sampling):
    """Fields of completions and chats."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
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
    def _needs_stream(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self) -> SamplingParams:
        """Raises `GenerationError` for a value out of range."""
        return self._params(self.max_tokens)

    def _params(self, max_tokens: int | None, **more: Any) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        same_names = {
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed",
            "presence_penalty", "frequency_penalty",
        }  # fmt: skip
        values = {"temperature": 1.0, **self.model_dump(include=same_names, exclude_none=True)}
        return SamplingParams(
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            stop=tuple(stop or ()),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            **values,
            **more,
        )


class CompletionRequest(SamplingRequest):
    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ChatRequest(SamplingRequest):
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
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same: give one")
        if self.tools is None and (self.tool_choice or self.parallel_tool_calls) is not None:
            raise ValueError("tool_choice and parallel_tool_calls need tools")
        if self.must_call and self._json_schema() is not None:
            raise ValueError("response_format cannot be combined with a required tool call")
        if self.retrieval is not None and self.knowledge_base is None:
            raise ValueError("retrieval needs knowledge_base")
        if isinstance(self.tool_choice, ToolChoice) and not self.allowed_tools:
            raise ValueError(
                f"tool_choice names a tool that is not in tools: {self.tool_choice.function.name!r}"
            )
        return self

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    @property
    def allowed_tools(self) -> list[dict[str, Any]]:
        """Tools for the chat template; empty with `tool_choice: none`."""
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
    def token_limit(self) -> int | None:
        limit = self.max_completion_tokens
        return self.max_tokens if limit is None else limit

    def params(self, lark: str | None = None) -> SamplingParams:
        """`lark`: a grammar of the required tool calls."""
        return self._params(
            self.token_limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=self._json_schema(),
            lark=lark,
        )

    def _json_schema(self) -> str | None:
        match self.response_format:
            case JsonObject():
                return '{"type": "object"}'
            case JsonSchema(json_schema=named):
                return json.dumps(named.schema_)
        return None
