"""Request and response bodies of Anthropic's Messages API, beta fields included."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from khaosz.inference.sampling import MAX_STOPS
from khaosz.serve.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    FunctionName,
    Ignored,
    RequestModel,
    ToolName,
    Unsupported,
    text_only,
)
from khaosz.serve.replies import CitationReply, LanguageWarningReply, Reply, RetrievalReply
from khaosz.serve.schema import AnswerRequest, Budget, Stop, TemplateKwargs, Tokens


class Sent(BaseModel):
    """Of an earlier answer, with fields that have no effect."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextBlock(Sent):
    type: Literal["text"]
    text: str


class ThinkingBlock(Sent):
    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Sent):
    """Of another server: nothing can be read from it."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Sent):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Texts = Annotated[
    str | Annotated[list[TextBlock], Field(max_length=MAX_MESSAGES)], BeforeValidator(text_only)
]


class ToolResultBlock(Sent):
    """A result that is an error begins with "Error: " for the model."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


class UserTurn(RequestModel):
    role: Literal["user"]
    content: Annotated[
        str
        | Annotated[
            list[Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]],
            Field(max_length=MAX_MESSAGES),
        ],
        BeforeValidator(text_only),
    ]


class AssistantTurn(RequestModel):
    role: Literal["assistant"]
    content: Annotated[
        str
        | Annotated[
            list[
                Annotated[
                    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock,
                    Field(discriminator="type"),
                ]
            ],
            Field(max_length=MAX_MESSAGES),
        ],
        BeforeValidator(text_only),
    ]


class SystemTurn(RequestModel):
    role: Literal["system"]
    content: Texts


AnyMessage = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class CustomTool(RequestModel):
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    allowed_callers: Ignored = None
    cache_control: Ignored = None
    defer_loading: Ignored = None
    eager_input_streaming: Ignored = None
    input_examples: Ignored = None
    strict: Ignored = None  # forced calls fit their schema in either case


def _custom_only(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise ValueError(f"tools of type {kind!r} are not supported by this server: custom only")
    return tool


class AutoChoice(RequestModel):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(FunctionName):
    type: Literal["tool"]
    disable_parallel_tool_use: bool | None = None


class NoChoice(RequestModel):
    type: Literal["none"]


class Thinking(RequestModel):
    """Without it, and with "disabled", the answer has no thinking blocks. budget_tokens: as
    thinking_budget."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Budget | None = None
    display: Ignored = None


class JsonFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(RequestModel):
    format: JsonFormat | None = None
    effort: Ignored = None
    task_budget: Ignored = None


class CountRequest(RequestModel):
    """Of a request whose tokens are counted."""

    model: str
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    tools: (
        Annotated[
            list[Annotated[CustomTool, BeforeValidator(_custom_only)]], Field(max_length=MAX_TOOLS)
        ]
        | None
    ) = None
    tool_choice: (
        Annotated[AutoChoice | NamedChoice | NoChoice, Field(discriminator="type")] | None
    ) = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None  # its earlier name in beta versions
    mcp_servers: Unsupported = None
    cache_control: Ignored = None
    context_management: Ignored = None
    speed: Ignored = None
    user_profile_id: Ignored = None
    workspace_id: Ignored = None
    chat_template_kwargs: TemplateKwargs | None = None

    @property
    def think(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"


class MessagesRequest(CountRequest, AnswerRequest):
    """min_p, repetition_penalty, seed, thinking_budget, chat_template_kwargs, knowledge_base and
    retrieval are not Anthropic's."""

    max_tokens: Tokens
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    container: Unsupported = None
    thread: Unsupported = None
    billing_policy: Ignored = None
    compaction: Ignored = None
    diagnostics: Ignored = None
    fallback_credit_token: Ignored = None
    fallbacks: Ignored = None
    inference_geo: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None


# --------------------------------------------------------------------------------------- responses


class TextReply(Reply):
    type: Literal["text"]
    text: str
    citations: None


class ThinkingReply(Reply):
    """signature: always empty."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseReply(Reply):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Reply):
    """input_tokens: those that the prefix cache did not have."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageReply(Reply):
    """citations and retrieval: with a knowledge base."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextReply | ThinkingReply | ToolUseReply]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage
    citations: list[CitationReply] | None = None
    retrieval: RetrievalReply | None = None
    warning: LanguageWarningReply | None = None


class TokensCount(Reply):
    input_tokens: int


class MessagesErrorDetail(Reply):
    type: str
    message: str


class MessagesError(Reply):
    type: Literal["error"]
    error: MessagesErrorDetail


class ModelInfo(Reply):
    """max_input_tokens: the model's context, None for an embedder or reranker."""

    id: str
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class ModelPage(Reply):
    data: list[ModelInfo]
    has_more: Literal[False]
    first_id: str | None
    last_id: str | None
