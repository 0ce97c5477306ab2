"""Request bodies of OpenAI's API.

Types are strict, and an unknown field is an error that names it. Ranges repeat those of
`SamplingParams`, so that the OpenAPI document has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from khaosz.data.tokenizer.chat import reserved_name
from khaosz.data.tokenizer.thinking import SWITCHES, Effort, Thinking
from khaosz.inference.sampling import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP,
    MAX_STOPS,
    SamplingParams,
)
from khaosz.interop.sampling import sampling_values
from khaosz.rag.answer import PASSAGES
from khaosz.serve.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    AllowedTools,
    Ignored,
    Message,
    RequestModel,
    Tool,
    ToolChoice,
    Unsupported,
)

MAX_HITS = 100
MAX_PROMPTS = 64  # of one completion
DEFAULT_MAX_TOKENS = 1024  # of an answer, where the request sets no limit


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class PlainText(RequestModel):
    type: Literal["text"]


class JsonObject(RequestModel):
    type: Literal["json_object"]


class NamedSchema(RequestModel):
    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
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


class ChatRetrieval(Retrieval):
    """k: passages in the prompt. ask_anyway: the model is asked although no passage seems
    relevant."""

    k: Annotated[int, Field(ge=1, le=MAX_HITS)] = PASSAGES
    ask_anyway: bool = False


def _not_reserved(kwargs: dict[str, Any]) -> dict[str, Any]:
    if (name := reserved_name(kwargs)) is not None:
        raise ValueError(f"{name} is set by the chat itself")
    return kwargs


Tokens = Annotated[int, Field(ge=1)]
# Variables of the chat template, such as enable_thinking; vLLM's name.
TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_not_reserved), Field(max_length=64)]
# Tokens of thoughts; then they are closed, and the answer follows.
Budget = Annotated[int, Field(ge=0)]
# Any integer, as in OpenAI's API: its lowest 64 bits, so -1 is 2**64 - 1.
Seed = Annotated[int, AfterValidator(lambda seed: seed % 2**64)]
# As in OpenAI's Responses API. auto: the oldest turns are left out where the context is full.
Truncation = Literal["auto", "disabled"]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Probabilities(RequestModel):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None


class Sampling(Probabilities):
    max_tokens: Tokens | None = None


class AnswerRequest(Probabilities):
    """Fields that the requests of other protocols than OpenAI's chats have in common."""

    seed: Seed | None = None
    thinking_budget: Budget | None = None
    stream: bool | None = None
    knowledge_base: str | None = None
    retrieval: Retrieval | None = None


class SamplingRequest(Sampling):
    """Fields of completions and chats; typical_p is Ollama's."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Seed | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias], Field(max_length=MAX_BIASES)
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None  # without effect unless `stream`
    user: Ignored = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def params(self, defaults: Mapping[str, float]) -> SamplingParams:
        """`defaults`: of the model. Raises `GenerationError` for a value out of range."""
        return self._params(defaults, self.max_tokens)

    def _params(
        self, defaults: Mapping[str, float], max_tokens: int | None, **more: Any
    ) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        same_names = {
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed",
            "presence_penalty", "frequency_penalty", "typical_p",
        }  # fmt: skip
        asked = self.model_dump(include=same_names, exclude_none=True)
        if self.top_p == 0:  # the smallest nucleus: the most likely token
            asked["top_p"] = 1e-9
        return SamplingParams(
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            stop=tuple(stop or ()),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            **sampling_values(defaults, asked),
            **more,
        )


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompt = str | Ids


class CompletionRequest(SamplingRequest):
    """`prompt`: a text or ids, or a list of such, whose choices follow one another. `suffix`: the
    text after the gap to fill, for models that were trained to."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    suffix: str | None = None
    best_of: Unsupported = None
    echo: Unsupported = None
    logprobs: Unsupported = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("is empty: send a text, token ids, or a list of either")
        return value

    @field_validator("best_of", mode="before")
    @classmethod
    def _best_of_one(cls, value: Any) -> Any:
        return None if value == 1 else value

    @property
    def prompts(self) -> list[Prompt]:
        many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if many else [self.prompt]  # type: ignore[list-item, return-value]


class ChatRequest(SamplingRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: (
        Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None
    ) = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: Ignored = None
    moderation: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    thinking_budget: Budget | None = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    verbosity: Ignored = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    web_search_options: Unsupported = None
    knowledge_base: str | None = None
    retrieval: ChatRetrieval | None = None
    truncation: Truncation | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.must_call and not self.tools:
            raise ValueError("tool_choice needs tools")
        if self.retrieval is not None and self.knowledge_base is None:
            raise ValueError("retrieval needs knowledge_base")
        known = {tool.function.name for tool in self.tools or ()}
        for name in self._chosen or ():
            if name not in known:
                raise ValueError(f"tool_choice names a tool that is not in tools: {name!r}")
        return self

    @property
    def _chosen(self) -> list[str] | None:
        """The names that `tool_choice` restricts the tools to."""
        match self.tool_choice:
            case ToolChoice(function=chosen):
                return [chosen.name]
            case AllowedTools(allowed_tools=allowed):
                return [each.function.name for each in allowed.tools]
        return None

    @property
    def must_call(self) -> bool:
        match self.tool_choice:
            case AllowedTools(allowed_tools=allowed):
                return allowed.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    @property
    def allowed_tools(self) -> list[dict[str, Any]]:
        """Tools for the chat template; empty with `tool_choice: none`."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        chosen = self._chosen
        return [t.for_template() for t in tools if chosen is None or t.function.name in chosen]

    @property
    def one_call(self) -> bool:
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, ToolChoice)

    @property
    def token_limit(self) -> int | None:
        limit = self.max_completion_tokens  # the newer name, where both are given
        return self.max_tokens if limit is None else limit

    @property
    def enable_thinking(self) -> bool | None:
        """None: as the template does by default."""
        given = self.chat_template_kwargs or {}
        for name in SWITCHES:
            if isinstance(given.get(name), bool):
                return bool(given[name])
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    def template_kwargs(self, thinking: Thinking) -> dict[str, Any]:
        """For the chat template of a model. No grammar allows thoughts."""
        enable = self.enable_thinking
        if enable is None and (self.json_schema is not None or self.must_call):
            enable = False
        effort = self.reasoning_effort if thinking.efforts else None
        return thinking.template_kwargs(self.chat_template_kwargs, enable, effort)

    def params(self, defaults: Mapping[str, float], lark: str | None = None) -> SamplingParams:
        """`lark`: a grammar of the tool calls, and of the text where both are possible."""
        return self._params(
            defaults,
            self.token_limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=None if lark else self.json_schema,
            lark=lark,
            thinking_budget=self.thinking_budget,
        )

    @property
    def json_schema(self) -> str | None:
        """Of the answer's text."""
        match self.response_format:
            case JsonObject():
                return '{"type": "object"}'
            case JsonSchema(json_schema=named):
                return json.dumps(named.schema_)
        return None
