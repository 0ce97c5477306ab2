"""Request and response bodies of OpenAI's Responses API.

Items of earlier answers are accepted as the client's objects dump them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

from khaosz.data.tokenizer.thinking import Effort
from khaosz.inference.sampling import MAX_LOGPROBS
from khaosz.serve.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Function,
    FunctionName,
    Ignored,
    RefusalPart,
    RequestModel,
    Unsupported,
    text_only,
)
from khaosz.serve.replies import CitationReply, LanguageWarningReply, Reply, RetrievalReply
from khaosz.serve.schema import (
    AnswerRequest,
    JsonObject,
    NamedSchema,
    PlainText,
    TemplateKwargs,
    Tokens,
    Truncation,
)

_STATELESS = "this server stores no responses: send the earlier items as input"


def _refuse_stored(value: Any) -> None:
    if value is not None:
        raise ValueError(_STATELESS)


Stored = Annotated[
    Any, AfterValidator(_refuse_stored), Field(description="Null only.", exclude=True)
]


class Sent(BaseModel):
    """Of an earlier answer, with fields that have no effect."""

    model_config = ConfigDict(extra="ignore", strict=True)


class InputText(RequestModel):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    prompt_cache_breakpoint: Ignored = None


class OutputTextPart(Sent):
    type: Literal["input_text", "output_text", "text"]
    text: str


Texts = Annotated[
    str | Annotated[list[InputText], Field(max_length=MAX_MESSAGES)], BeforeValidator(text_only)
]


class InputMessageItem(RequestModel):
    type: Literal["message"] | None = None
    role: Literal["user", "system", "developer"]
    content: Texts
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None


class OutputMessageItem(Sent):
    type: Literal["message"] | None = None
    role: Literal["assistant"]
    content: Annotated[
        str | Annotated[list[OutputTextPart | RefusalPart], Field(max_length=MAX_MESSAGES)],
        BeforeValidator(text_only),
    ]


class FunctionCallItem(Sent):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Sent):
    type: Literal["function_call_output"]
    call_id: str
    output: Texts


class ReasoningTextPart(Sent):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningInputItem(Sent):
    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningTextPart], Field(max_length=MAX_MESSAGES)] = []
    content: Annotated[list[ReasoningTextPart], Field(max_length=MAX_MESSAGES)] | None = None


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _known_item(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "item_reference":
        raise ValueError(_STATELESS)
    if isinstance(kind, str) and kind not in _ITEMS:
        raise ValueError(f"items of type {kind!r} are not supported by this server")
    return item


def _kind(item: Any) -> str:
    get = item.get if isinstance(item, dict) else lambda name: getattr(item, name, None)
    if (kind := get("type")) in ("function_call", "function_call_output", "reasoning"):
        return str(kind)
    return "answer" if get("role") == "assistant" else "message"


Item = Annotated[
    Annotated[InputMessageItem, Tag("message")]
    | Annotated[OutputMessageItem, Tag("answer")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningInputItem, Tag("reasoning")],
    Discriminator(_kind),
    BeforeValidator(_known_item),
]


class ResponseTool(Function):
    type: Literal["function"]
    allowed_callers: Ignored = None
    async_: Annotated[Ignored, Field(alias="async")] = None
    defer_loading: Ignored = None
    output_schema: Ignored = None


def _function_only(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"tools of type {kind!r} are not supported by this server: functions only")
    return tool


AnyTool = Annotated[ResponseTool, BeforeValidator(_function_only)]


class NamedFunction(FunctionName):
    type: Literal["function"]


class AllowedFunctions(RequestModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[NamedFunction, BeforeValidator(_function_only)]],
        Field(min_length=1, max_length=MAX_TOOLS),
    ]


class JsonSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class TextConfig(RequestModel):
    format: (
        Annotated[PlainText | JsonObject | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Ignored = None


class ReasoningConfig(RequestModel):
    """effort: "none" asks the model not to reason."""

    effort: Effort | None = None
    context: Ignored = None
    generate_summary: Ignored = None
    mode: Ignored = None
    summary: Ignored = None


class ResponseStreamOptions(RequestModel):
    include_obfuscation: Ignored = None


class InputCountRequest(RequestModel):
    """Of a request whose tokens are counted."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions | None = (
        None
    )
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Truncation | None = None
    previous_response_id: Stored = None
    conversation: Stored = None
    personality: Ignored = None
    chat_template_kwargs: TemplateKwargs | None = None


class ResponseRequest(InputCountRequest, AnswerRequest):
    """top_k, min_p, repetition_penalty, seed, thinking_budget, chat_template_kwargs, knowledge_base
    and retrieval are not OpenAI's."""

    max_output_tokens: Tokens | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[str], Field(max_length=MAX_TOOLS)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    stream_options: ResponseStreamOptions | None = None
    background: Unsupported = None
    prompt: Unsupported = None
    access_programs: Ignored = None
    background_options: Ignored = None
    context_management: Ignored = None
    image: Ignored = None
    max_tool_calls: Ignored = None  # of built-in tools
    moderation: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None  # responses are never stored
    user: Ignored = None

    @property
    def logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())


# --------------------------------------------------------------------------------------- responses

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponseLogprob(Reply):
    token: str
    bytes: list[int]
    logprob: float


class ResponseTopLogprobs(ResponseLogprob):
    top_logprobs: list[ResponseLogprob]


class OutputText(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ResponseTopLogprobs]


class OutputMessage(Reply):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Reply):
    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class ReasoningText(Reply):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(Reply):
    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[Any]
    content: list[ReasoningText]


class InputDetails(Reply):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Reply):
    reasoning_tokens: int


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(Reply):
    code: str
    message: str


class IncompleteDetails(Reply):
    reason: Literal["max_output_tokens"]


class ResponseReply(Reply):
    """retrieval and citations: with a knowledge base; left_out: with `truncation: auto`."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall | OutputReasoning]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Truncation
    usage: ResponseUsage | None
    citations: list[CitationReply] | None = None
    retrieval: RetrievalReply | None = None
    left_out: int | None = None
    warning: LanguageWarningReply | None = None


class InputCount(Reply):
    object: Literal["response.input_tokens"]
    input_tokens: int
