"""Ollama's API, translated into chats, completions and embeddings."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from khaosz import __version__
from khaosz.data.tokenizer.thinking import SWITCHES
from khaosz.serve.answering import Answering
from khaosz.serve.errors import ApiError, errors
from khaosz.serve.ollama.models import Catalogue
from khaosz.serve.ollama.output import OllamaLayout, nanoseconds
from khaosz.serve.ollama.schema import (
    GenerateReply,
    GenerateRequest,
    OllamaChatReply,
    OllamaChatRequest,
    OllamaEmbeddingsReply,
    OllamaEmbeddingsRequest,
    OllamaEmbedReply,
    OllamaEmbedRequest,
    OllamaError,
    OllamaMessage,
    OllamaRequest,
    Options,
    Processes,
    Shown,
    ShowRequest,
    Tags,
    Version,
)
from khaosz.serve.openai.vectors import EmbeddingRequest, Vectors
from khaosz.serve.replies import Reply
from khaosz.serve.schema import CompletionRequest
from khaosz.serve.translation import (
    function_call,
    function_tool,
    translated_chat,
    validated,
)

VERSION = "0.12.6"  # of Ollama; some clients ask for a recent one
_SAMPLING = {
    "temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
}  # fmt: skip
_MANAGEMENT = (
    ("POST", "pull"), ("POST", "push"), ("POST", "create"), ("POST", "copy"), ("DELETE", "delete"),
    ("POST", "blobs/{digest}"), ("GET", "blobs/{digest}"),
)  # fmt: skip


def ollama_routes(answering: Answering, vectors: Vectors, catalogue: Catalogue) -> APIRouter:
    router = APIRouter(prefix="/api")

    def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return errors(*statuses, model=OllamaError)

    @router.post(
        "/chat",
        responses={**_lines(OllamaChatReply), **failures(400, 404, 409, 503, 504)},
        response_model=None,
    )
    async def chat(request: OllamaChatRequest, raw_request: Request) -> Response:
        """Answer a conversation, as Ollama does; without messages, load the model."""
        model = catalogue.resolve(request.model)
        layout = OllamaLayout(request.model, chat=True)
        if not request.messages:
            return await load(model, layout, request.streams)
        messages, prefill = list(request.messages), ""
        last = messages[-1]
        if len(messages) > 1 and last.role == "assistant" and not last.tool_calls:
            prefill = messages.pop().content or ""
        values = _values(request, model)
        values["messages"] = _messages(messages)
        values["tools"] = [
            function_tool(t.function.name, t.function.description, t.function.parameters)
            for t in request.tools or ()
        ] or None
        made = translated_chat(values)
        return await answering.chat(made, raw_request, layout, prefill=prefill)

    @router.post(
        "/generate",
        responses={**_lines(GenerateReply), **failures(400, 404, 409, 503, 504)},
        response_model=None,
    )
    async def generate(request: GenerateRequest, raw_request: Request) -> Response:
        """Answer a prompt, as Ollama does; without one, load the model."""
        model = catalogue.resolve(request.model)
        layout = OllamaLayout(request.model, chat=False)
        if not request.prompt and not request.suffix:
            return await load(model, layout, request.streams)
        values = _values(request, model)
        if request.raw or request.suffix:
            made = _continued(request, values)
            return await answering.complete(made, raw_request, layout)
        system = [{"role": "system", "content": request.system}] if request.system else []
        values["messages"] = [*system, {"role": "user", "content": request.prompt}]
        return await answering.chat(translated_chat(values), raw_request, layout)

    async def load(model: str, layout: OllamaLayout, streams: bool) -> Response:
        start = time.perf_counter()
        answering.models.give_back(await answering.models.take(model))
        body = layout.loaded(time.perf_counter() - start)
        kind = layout.media_type if streams else "application/json"
        return Response(layout.line(body), media_type=kind)

    @router.post("/embed", response_model=OllamaEmbedReply, responses=failures(400, 404))
    async def embed(request: OllamaEmbedRequest) -> dict[str, Any]:
        """Vectors of length 1."""
        start = time.perf_counter()
        texts = [request.input] if isinstance(request.input, str) else request.input
        found, tokens = await vectors_of(request.model, texts, request.dimensions)
        return {
            "model": request.model,
            "embeddings": found,
            "total_duration": nanoseconds(time.perf_counter() - start),
            "load_duration": 0,
            "prompt_eval_count": tokens,
        }

    @router.post("/embeddings", response_model=OllamaEmbeddingsReply, responses=failures(400, 404))
    async def embeddings(request: OllamaEmbeddingsRequest) -> dict[str, Any]:
        """The vector of one text."""
        found, _ = await vectors_of(request.model, [request.prompt or ""], None)
        return {"embedding": found[0] if found else []}

    async def vectors_of(
        model: str, texts: list[str], dimensions: int | None
    ) -> tuple[list[list[float]], int]:
        """None for nothing, as Ollama's clients ask to load a model."""
        if not any(texts):
            texts = []
        name = catalogue.resolve(model)
        values = {"model": name, "input": texts or ["x"], "dimensions": dimensions}
        found, tokens = await vectors.embed(validated(EmbeddingRequest, values))
        return (found.tolist(), tokens) if texts else ([], 0)

    @router.get("/tags", response_model=Tags, responses=failures())
    async def tags() -> dict[str, Any]:
        """All models."""
        return {"models": await asyncio.to_thread(catalogue.tags)}

    @router.get("/ps", response_model=Processes, responses=failures())
    async def processes() -> dict[str, Any]:
        """Loaded models."""
        return {"models": await asyncio.to_thread(catalogue.processes)}

    @router.post("/show", response_model=Shown, responses=failures(400, 404))
    async def show(request: ShowRequest) -> dict[str, Any]:
        """What a model is and can do."""
        name = request.model or request.name
        if not name:
            raise ApiError(400, "model: required", param="model")
        return await asyncio.to_thread(catalogue.show, catalogue.resolve(name))

    @router.get("/version", response_model=Version, responses=failures())
    async def version() -> dict[str, str]:
        """The version of Ollama whose API this is, and of this server."""
        return {"version": VERSION, "khaosz": __version__}

    async def manage() -> None:
        raise ApiError(501, "this server manages no models: use khaosz pull, and restart it")

    for method, path in _MANAGEMENT:
        router.add_api_route(f"/{path}", manage, methods=[method], include_in_schema=False)
    return router


def _lines(model: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses of a route that answers with `model`, or with one object a line."""
    line = {"type": "string", "description": "An object, or an error, a line."}
    content = {OllamaLayout.media_type: {"schema": line}}
    return {200: {"model": model, "description": "The answer.", "content": content}}


def _values(request: OllamaRequest, model: str) -> dict[str, Any]:
    """Fields of a chat."""
    options = request.options or Options()
    values = options.model_dump(include=_SAMPLING)
    values |= {"model": model, "stream": request.streams, "stop": options.stop or None}
    if options.num_predict is not None:
        values["max_tokens"] = options.num_predict if options.num_predict > 0 else 2**31
    if options.top_k is not None:
        values["top_k"] = max(options.top_k, 0)
    if options.seed is not None and options.seed >= 0:
        values["seed"] = options.seed
    if options.repeat_last_n != 0:
        values["repetition_penalty"] = options.repeat_penalty
    values["truncation"] = "disabled" if request.truncate is False else "auto"
    if request.logprobs:
        values |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.format == "json":
        values["response_format"] = {"type": "json_object"}
    elif isinstance(request.format, dict):
        schema = {"name": "format", "schema": request.format}
        values["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(request.think, str):
        values["reasoning_effort"] = request.think
    kwargs = {} if not isinstance(request.think, bool) else {SWITCHES[0]: request.think}
    values["chat_template_kwargs"] = {**kwargs, **(request.chat_template_kwargs or {})} or None
    values["thinking_budget"] = request.thinking_budget
    values["knowledge_base"] = request.knowledge_base
    if request.retrieval is not None:
        values["retrieval"] = request.retrieval.model_dump()
    return values


def _continued(request: GenerateRequest, values: dict[str, Any]) -> CompletionRequest:
    """Raises `ApiError` for fields that need a chat."""
    for name in ("reasoning_effort", "chat_template_kwargs", "thinking_budget"):
        values.pop(name, None)
    for name in ("response_format", "logprobs", "knowledge_base"):
        if values.pop(name, None):
            field = "format" if name == "response_format" else name
            raise ApiError(400, f"{field}: not supported with raw or suffix", param=field)
    values.pop("retrieval", None)
    values.pop("truncation")
    return validated(
        CompletionRequest, {**values, "prompt": request.prompt or "", "suffix": request.suffix}
    )


def _messages(messages: list[OllamaMessage]) -> list[dict[str, Any]]:
    """Messages of a chat. Ollama's calls may have no ids: a result belongs to the first call of its
    tool that has none yet."""
    translated: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # id and name
    for message in messages:
        made: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.role == "assistant":
            if message.thinking:
                made["reasoning_content"] = message.thinking
            calls: list[dict[str, Any]] = []
            for call in message.tool_calls or ():
                name = call.function.name
                id = call.id or f"call_{len(translated)}_{len(calls)}"
                waiting.append((id, name))
                calls.append(function_call(id, name, call.function.arguments))
            made |= {"tool_calls": calls} if calls else {}
        elif message.role == "tool":
            fits = (
                each for each in waiting
                if each[0] == message.tool_call_id
                or (message.tool_call_id is None and message.tool_name in (None, each[1]))
            )  # fmt: skip
            if (call_of := next(fits, None)) is not None:
                waiting.remove(call_of)
            made["tool_call_id"] = message.tool_call_id or (call_of[0] if call_of else "call")
            if message.tool_name:
                made["name"] = message.tool_name
        translated.append(made)
    return translated
