"""Request and response bodies of Ollama's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from khaosz.data.tokenizer.thinking import Effort
from khaosz.inference.sampling import MAX_LOGPROBS, MAX_STOPS
from khaosz.serve.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Ignored,
    RequestModel,
    ToolName,
    Unsupported,
)
from khaosz.serve.openai.vectors import MAX_INPUTS
from khaosz.serve.replies import CitationReply, LanguageWarningReply, Reply, RetrievalReply
from khaosz.serve.schema import Budget, Penalty, Retrieval, Stop, TemplateKwargs


def _no_images(value: Any) -> None:
    if value:
        raise ValueError("this model reads text only: images cannot be sent to it")


Images = Annotated[Any, AfterValidator(_no_images), Field(description="Empty only.", exclude=True)]


def _off(value: Any, off: Any) -> Any:
    if value not in (None, off):
        raise ValueError("not supported by this server")


Mirostat = Annotated[int | None, AfterValidator(lambda value: _off(value, 0))]
TailFree = Annotated[float | None, AfterValidator(lambda value: _off(value, 1))]
Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class Options(RequestModel):
    """num_predict: without it 1,024 tokens, and as many as the context has if it is not above 0.
    repeat_penalty counts the whole text, unless repeat_last_n is 0. seed: a negative one is no
    seed. What a model is loaded with has no effect; num_ctx neither, since the context is the
    model's own."""

    num_predict: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Count | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    repeat_last_n: Count | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    mirostat: Mirostat = None
    tfs_z: TailFree = None
    embedding_only: Ignored = None
    f16_kv: Ignored = None
    logits_all: Ignored = None
    low_vram: Ignored = None
    main_gpu: Ignored = None
    mirostat_eta: Ignored = None
    mirostat_tau: Ignored = None
    num_batch: Ignored = None
    num_ctx: Ignored = None
    num_gpu: Ignored = None
    num_keep: Ignored = None
    num_thread: Ignored = None
    numa: Ignored = None
    penalize_newline: Ignored = None
    use_mlock: Ignored = None
    use_mmap: Ignored = None
    vocab_only: Ignored = None


class OllamaRequest(RequestModel):
    """Fields of chats and completions. chat_template_kwargs, thinking_budget, knowledge_base and
    retrieval are not Ollama's. think: whether the answer has thoughts, or their effort."""

    model: str
    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    stream: bool | None = None
    think: bool | Effort | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    thinking_budget: Budget | None = None
    truncate: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    knowledge_base: str | None = None
    retrieval: Retrieval | None = None
    keep_alive: Ignored = None
    shift: Ignored = None

    @property
    def streams(self) -> bool:
        return self.stream is not False


class CalledOllamaFunction(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    arguments: dict[str, Any] = {}


class OllamaCall(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    function: CalledOllamaFunction


class OllamaMessage(RequestModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: Ignored = None
    images: Images = None


class OllamaFunction(RequestModel):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored = None


class OllamaTool(RequestModel):
    type: Literal["function"] | None = None
    function: OllamaFunction
    items: Ignored = None


class OllamaChatRequest(OllamaRequest):
    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[OllamaTool], Field(max_length=MAX_TOOLS)] | None = None


class GenerateRequest(OllamaRequest):
    """With `raw` and `suffix` the prompt is continued without the chat template."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: Images = None
    template: Unsupported = None
    context: Unsupported = None
    width: Unsupported = None
    height: Unsupported = None
    steps: Unsupported = None


class OllamaEmbedRequest(RequestModel):
    model: str
    input: str | Annotated[list[str], Field(max_length=MAX_INPUTS)]
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate: Annotated[bool | None, AfterValidator(lambda value: _off(value, True))] = None
    options: Ignored = None
    keep_alive: Ignored = None


class OllamaEmbeddingsRequest(RequestModel):
    model: str
    prompt: str | None = None
    options: Ignored = None
    keep_alive: Ignored = None


class ShowRequest(RequestModel):
    """`name`: the earlier spelling of `model`."""

    model: str | None = None
    name: str | None = None
    system: Ignored = None
    template: Ignored = None
    verbose: Ignored = None
    options: Ignored = None


# --------------------------------------------------------------------------------------- responses


class OllamaError(Reply):
    error: str


class OllamaLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class OllamaLogprobs(OllamaLogprob):
    top_logprobs: list[OllamaLogprob]


class Ended(Reply):
    """Durations in nanoseconds. retrieval and citations: with a knowledge base; left_out: messages
    that the model did not see."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"]
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[OllamaLogprobs] | None = None
    citations: list[CitationReply] | None = None
    retrieval: RetrievalReply | None = None
    left_out: int | None = None
    warning: LanguageWarningReply | None = None


class OllamaCalled(Reply):
    name: str
    arguments: dict[str, Any]


class OllamaCallReply(Reply):
    id: str
    function: OllamaCalled


class OllamaMessageReply(Reply):
    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[OllamaCallReply] | None = None


class OllamaChatReply(Ended):
    message: OllamaMessageReply


class GenerateReply(Ended):
    response: str
    thinking: str | None = None


class OllamaEmbedReply(Reply):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingsReply(Reply):
    embedding: list[float]


class Details(Reply):
    """parameter_size: as 494.0M or 1.5B; quantization_level: as Q4_K_M or BF16."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(Reply):
    """size: bytes on disk; digest: of the files' names, sizes and times, not of their content."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(Reply):
    models: list[Tag]


class Process(Reply):
    """size: bytes in memory. expires_at: a model is unloaded where another one needs its memory, so
    the date is far away."""

    name: str
    model: str
    size: int
    size_vram: int
    digest: str
    details: Details
    expires_at: str
    context_length: int


class Processes(Reply):
    models: list[Process]


class Shown(Reply):
    modelfile: str
    parameters: str
    template: str
    license: str
    modified_at: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[Literal["completion", "tools", "insert", "thinking", "embedding"]]


class Version(Reply):
    """version: of Ollama, whose API this is; khaosz: of this server."""

    version: str
    khaosz: str
