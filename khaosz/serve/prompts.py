"""Requests in the engine's terms: prompt ids, sampling parameters, and how the output is read."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import encode_control
from khaosz.data.tokenizer.messages import text_of_parts
from khaosz.data.tokenizer.thinking import opens_thought
from khaosz.inference.generator import Generator
from khaosz.inference.parts import Calls
from khaosz.inference.sampling import SamplingParams
from khaosz.rag.answer import REWRITE_TOKENS
from khaosz.serve.errors import ApiError
from khaosz.serve.knowledge.grounding import RetrievalContext, StoredContext, retrieve_context
from khaosz.serve.knowledge.library import Library
from khaosz.serve.knowledge.search import searcher
from khaosz.serve.models import Use
from khaosz.serve.schema import (
    ChatRequest,
    ChatRetrieval,
    CompletionRequest,
    Prompt,
)
from khaosz.serve.tools import add_tools, call_format, call_grammar
from khaosz.serve.truncation import prompt_room

COUNTED = 16  # contexts: what is only counted may be longer than an answer allows
_FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


@dataclass(frozen=True)
class Continued:
    """An answer that is continued: its text so far as the model wrote it, with markers, and
    `RetrievalContext.stored` of what it is based on."""

    text: str
    context: dict[str, Any] | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """How the model's text is parsed and formatted. `chat` chooses between the two layouts;
    `calls`: how this model writes tool calls, and `tools`: the parameters of those that it may
    call, by name; `reasoning`: the prompt has opened the reasoning;
    `show_reasoning`: it is part of the answer; `one_call`: further calls are dropped; `context`:
    what the answer may cite; `left_out`: messages that the model does not see, None where the
    request does not allow it; `warning`: that the model lacks the language of the request;
    `continued`: what the answer continues."""

    chat: bool
    logprobs: bool = False
    calls: Calls = "none"
    tools: Mapping[str, Any] = field(default_factory=dict)
    reasoning: bool = False
    show_reasoning: bool = True
    one_call: bool = False
    context: RetrievalContext | StoredContext | None = None
    left_out: int | None = None
    warning: dict[str, str] | None = None
    continued: Continued | None = None


@dataclass(frozen=True)
class EngineRequest:
    """A request in the engine's terms; the choices of its prompts follow one another."""

    prompts: list[list[int]]
    params: SamplingParams
    format: ResponseFormat

    @property
    def refusal(self) -> str | None:
        """The answer where a knowledge base contains none; the model is not asked."""
        context = self.format.context
        return context.refusal if context is not None and context.prompt is None else None


async def chat_context(request: ChatRequest, use: Use, library: Library | None) -> RetrievalContext:
    """Raises `ApiError` as `retrieve_context` does, and for an unknown knowledge base."""
    assert request.knowledge_base is not None
    if library is None:
        raise ApiError(404, f"knowledge base {request.knowledge_base!r} not found")
    generator = use.generator
    tools = request.allowed_tools
    kwargs = request.template_kwargs(generator.thinking)

    def count(messages: list[dict[str, Any]]) -> int:
        prompt = add_tools(messages, tools, generator.tokenizer)
        return len(generator.chat_ids(*prompt, template_kwargs=kwargs))

    async def ask_model(messages: list[dict[str, Any]]) -> str:
        ids = await asyncio.to_thread(_prompt_without_reasoning, messages, generator)
        if len(ids) + REWRITE_TOKENS > generator.context:
            return ""
        ticket = await use.worker.submit(ids, SamplingParams(REWRITE_TOKENS, 0.0), use.adapter)
        try:
            return "".join([output.text async for output in ticket.outputs()])
        finally:
            ticket.close()

    base = await asyncio.to_thread(library.base, request.knowledge_base)
    retrieval = request.retrieval or ChatRetrieval()
    search = await searcher(base, retrieval, library.retrieval)
    messages = [_in_one_text(message.for_template()) for message in request.messages]
    # Where the request sets no limit, passages may use the context that an answer might.
    room = prompt_room(request.token_limit, generator)
    if request.token_limit is not None and request.truncation != "auto":
        room = generator.context - request.token_limit
    return await retrieve_context(
        messages, search, count, room, ask_model, anyway=retrieval.ask_anyway
    )


def _in_one_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": text_of_parts(content)} if isinstance(content, list) else message


def _prompt_without_reasoning(messages: list[dict[str, Any]], generator: Generator) -> list[int]:
    kwargs = generator.thinking.template_kwargs(None, False)
    ids = generator.chat_ids(messages, template_kwargs=kwargs)
    return _close_reasoning(ids, generator) if _opens_reasoning(ids, generator) else ids


def _opens_reasoning(prompt: list[int], generator: Generator) -> bool:
    """Templates of reasoning models do, at the end of the prompt."""
    return opens_thought(generator.tokenizer.decode(prompt[-8:]))


def _close_reasoning(prompt: list[int], generator: Generator) -> list[int]:
    return [*prompt, *encode_control(generator.tokenizer, generator.thinking.close)]


def chat_request(
    request: ChatRequest,
    generator: Generator,
    context: RetrievalContext | StoredContext | None = None,
    *,
    prefill: str = "",
    continued: Continued | None = None,
    limit: int | None = None,
) -> EngineRequest:
    """`prefill`: a text that the answer continues; `continued`: an answer of this server that is
    continued; `limit`: tokens from which on the rest is not read, by default the context.

    Raises `GenerationError`, `DataError` and `TokenizerError` for an invalid request."""
    tokenizer, limit = generator.tokenizer, limit or generator.context
    tools = request.allowed_tools
    messages = (
        context.messages if context else [message.for_template() for message in request.messages]
    )
    think = request.enable_thinking is not False
    if prefill:
        request = request.model_copy(update={"reasoning_effort": "none"})
    kwargs = request.template_kwargs(generator.thinking)
    prompt = generator.chat_ids(
        *add_tools(messages, tools, tokenizer), template_kwargs=kwargs, limit=limit
    )
    lark, schema = None, request.json_schema
    if request.must_call or (tools and schema is not None):
        schema = None if request.must_call else schema
        lark = call_grammar(tools, tokenizer, several=not request.one_call, or_else=schema)
    params = request.params(generator.sampling, lark)
    reasoning = _opens_reasoning(prompt, generator)
    if reasoning and (params.form is not None or prefill or not think):  # no grammar allows it
        prompt, reasoning = _close_reasoning(prompt, generator), False
    if prefill:
        prompt = [*prompt, *tokenizer.encode(prefill, limit=limit)]
    if continued is not None:
        prompt = [*prompt, *tokenizer.encode(continued.text, limit=generator.context)]
    response_format = ResponseFormat(
        chat=True,
        logprobs=bool(request.logprobs),
        calls=call_format(tokenizer) if tools else "none",
        tools={tool["function"]["name"]: tool["function"].get("parameters") for tool in tools},
        reasoning=reasoning,
        show_reasoning=think,
        one_call=request.one_call,
        context=context,
        continued=continued,
    )
    return EngineRequest([prompt], params, response_format)


def text_request(request: CompletionRequest, generator: Generator) -> EngineRequest:
    """Raises `GenerationError` and `TokenizerError` for an invalid request."""
    if request.suffix:
        prompts = [_gap_ids(each, request.suffix, generator) for each in request.prompts]
    else:
        prompts = [generator.ids(each, limit=generator.context) for each in request.prompts]
    return EngineRequest(prompts, request.params(generator.sampling), ResponseFormat(chat=False))


def _gap_ids(prompt: Prompt, suffix: str, generator: Generator) -> list[int]:
    """A prompt whose continuation fits before `suffix`: arXiv:2207.14255, in the order prefix,
    suffix, middle, with the tokens of Qwen's and StarCoder's models."""
    tokenizer = generator.tokenizer
    names = gap_tokens(tokenizer)
    if names is None:
        raise ApiError(400, "suffix: this model cannot fill in a gap", param="suffix")
    before, after, middle = (tokenizer.special_ids[name] for name in names)
    limit = generator.context
    text = tokenizer.encode(prompt, limit=limit) if isinstance(prompt, str) else prompt
    return [before, *text, after, *tokenizer.encode(suffix, limit=limit), middle]


def gap_tokens(tokenizer: Tokenizer) -> tuple[str, str, str] | None:
    """The tokens before a prefix, a suffix and the middle, of models that fill in a gap."""
    special = tokenizer.special_ids
    known = (names for names in _FILL_IN_THE_MIDDLE if all(name in special for name in names))
    return next(known, None)
