"""One interface for every trained stage and every open model: whole, batch, streaming, chat,
embeddings; text, messages or ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.data.tokenizer.thinking import Thinking, thinking_of
from khaosz.errors import ConfigError, GenerationError
from khaosz.inference.adapter import Adapter
from khaosz.inference.engine import Engine
from khaosz.inference.linear.native import library
from khaosz.inference.request import Logprob, Output
from khaosz.inference.runner import Chunk, Runner, storage_of
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.adapter import adapter_of
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.models import ModelSource, open_model, open_tokenizer
from khaosz.interop.sampling import FALLBACK, sampling_defaults, sampling_values
from khaosz.memory.inference import InferencePlan
from khaosz.memory.machine import Limit, memory_limits, release_freed_memory, resident_memory
from khaosz.memory.parts import Memory, check_memory
from khaosz.model import Transformer

# Bytes of Python, PyTorch and what a chat imports; of a token of the vocabulary. Measured.
_PROCESS, _TOKEN = 256 << 20, 700

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """One piece of a stream: text that is final and, in the last one, why it ended."""

    text: str
    tokens: int  # generated so far
    finish_reason: str | None = None  # "stop" | "length" with the last piece


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int  # generated, the one that ends the turn included
    finish_reason: str  # "stop": an end token or a stop string; "length": a limit was reached
    logprobs: tuple[Logprob, ...] = ()
    # What was generated, token by token, an end token included. It adds nothing to `text`.
    ids: tuple[int, ...] = field(default=(), compare=False)


class Generator:
    """Generates with one model and its tokenizer, through one `Engine`. Not thread-safe."""

    def __init__(
        self,
        model: Transformer | Runner,
        tokenizer: Tokenizer,
        *,
        prompt_lookup: bool = False,
        lookup: bool = False,
        context: int | None = None,
        memory: Memory | None = None,
        sampling: Mapping[str, float] | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """A `Transformer` is read in every pass, so it may be trained between calls. `lookup` is
        the old name of `prompt_lookup`; `context` as for `Engine`; `memory`: what was planned;
        `sampling`: parameters of requests that name none, by default `FALLBACK`; `adapter`: of
        every prompt."""
        runner = model if isinstance(model, Runner) else Runner.from_module(model)
        self.engine = Engine(
            runner, tokenizer, prompt_lookup=prompt_lookup or lookup, context=context
        )
        self.memory, self.adapter = memory, adapter
        self.sampling = FALLBACK if sampling is None else sampling
        self.model, self.tokenizer = model, tokenizer
        self._live = isinstance(model, Transformer)

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        deterministic: bool = False,
        prompt_lookup: bool = False,
        lookup: bool = False,
        context: int | None = None,
        memory_check: bool = True,
        reranker: bool = False,
    ) -> Generator:
        """Of a model directory, a .gguf file, or a directory of an adapter, which is added to the
        model that it names; `dtype` as for `Runner.open`.

        `context` bounds the tokens of prompt and answer, by default the model's own, or as many as
        the free memory holds. Raises `NotEnoughMemoryError`, before weights are read, for a
        model or a context that does not fit, unless `memory_check` is off; `ConfigError` for a
        context beyond the model's. `reranker`: also of a file with output rows for yes and no only.
        """
        added = adapter_of(path)
        if added is not None:
            path, adapter_directory = added
        source = open_model(path, reranker=reranker)
        plan = plan_inference(source, device=device, dtype=dtype, context=context)
        gguf = source if isinstance(source, GgufModel) else None
        # First, since a large vocabulary takes 100 MB, which the plan counts as taken.
        tokenizer = open_tokenizer(path) if gguf is None else gguf.tokenizer()
        release_freed_memory()
        base, limits = resident_memory(), memory_limits(device)
        if memory_check:
            explicit = context is not None
            plan = fitted(plan, base, limits, str(path), explicit=explicit, device=device)
        if gguf is not None and torch.device(device).type == "cpu":  # parsed once
            runner = Runner.from_gguf(gguf, dtype=dtype, deterministic=deterministic)
        else:
            runner = Runner.open(path, device=device, dtype=dtype, deterministic=deterministic)
        adapter = None
        if added is not None:
            adapter = Adapter(
                runner.config, adapter_directory, device=runner.device, dtype=runner.dtype
            )
        return cls(
            runner,
            tokenizer,
            prompt_lookup=prompt_lookup or lookup,
            context=plan.context,
            memory=plan.memory(base),
            sampling=sampling_defaults(path),
            adapter=adapter,
        )

    @property
    def memory_line(self) -> str | None:
        """What was planned for, in one line; None for a model that was not loaded from a file."""
        if self.memory is None:
            return None
        own = self.engine.runner.config.max_position_embeddings
        of = "" if self.context == own else f" of {own:,}"
        line = self.memory.line(memory_limits(self.engine.runner.device), resident_memory())
        return f"{line}; with {self.context:,}{of} tokens of context"

    @property
    def context(self) -> int:
        """Positions a prompt and its answer may fill together."""
        return self.engine.context

    def params(self, **asked: Any) -> SamplingParams:
        """What is asked, by the names of `SamplingParams`, over this model's own sampling. Raises
        `GenerationError` for a value out of range."""
        return SamplingParams(**sampling_values(self.sampling, asked))

    @property
    def thinking(self) -> Thinking:
        """Whether answers begin with thoughts, by the chat template."""
        template = self.tokenizer.chat_template_for(None)
        return thinking_of(template, self.tokenizer.template_variables)

    def prompt_ids(self, text: str, *, limit: int | None = None) -> list[int]:
        """Ids of a text to continue, with what the tokenizer adds before and after a text: the
        begin token where documents are trained so. For `limit` see `Tokenizer.encode`."""
        by = self.tokenizer
        return [*by.begin_ids, *by.encode(text, limit=limit), *by.finish_ids]

    def chat_ids(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> list[int]:
        """Ids of a conversation, with the marker that starts the assistant's turn.
        `template_kwargs`: variables of the chat template, such as enable_thinking."""
        return encode_chat(
            self.tokenizer,
            list(messages),
            tools,
            add_generation_prompt=True,
            template_kwargs=template_kwargs,
            limit=limit,
        )[0]

    def ids(
        self,
        prompt: Prompt,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> list[int]:
        """A text to continue, messages to answer, or ids as they are."""
        if isinstance(prompt, str):
            return self.prompt_ids(prompt, limit=limit)
        if len(prompt) and isinstance(prompt[0], dict):
            return self.chat_ids(prompt, template_kwargs=template_kwargs)  # type: ignore[arg-type]
        return list(prompt)  # type: ignore[arg-type]

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking_budget: int | None = None,
    ) -> Completion:
        """The whole answer; the same text that `stream` yields in pieces.
        `chat_template_kwargs`: variables of the chat template, such as enable_thinking;
        `thinking_budget`: tokens of thoughts, as in `SamplingParams`."""
        if chat_template_kwargs and (isinstance(prompt, str) or not isinstance(prompt[0], dict)):
            raise GenerationError("is for messages", param="chat_template_kwargs")
        if thinking_budget is not None:
            params = replace(params or self.params(), thinking_budget=thinking_budget)
        ids = self.ids(prompt, template_kwargs=chat_template_kwargs)
        return self.generate_batch([ids], params)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answers to all prompts, computed together; the `n` choices of a prompt follow each other.

        `params` are one for all, or one each; by default this model's own. Raises `GenerationError`
        before anything is computed if a prompt or parameter is out of range, and at the end if an
        answer failed.
        """
        params = params or self.params()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise GenerationError(f"{len(prompts)} prompts with {len(each)} sets of parameters")
        added: list[int] = []
        outputs: dict[tuple[int, int], list[Output]] = {}
        open_choices = sum(its.n for its in each)
        try:
            for prompt, its in zip(prompts, each, strict=True):
                added.append(self._add(prompt, its))
            while open_choices:
                self.engine.step()
                for request_id in added:
                    for output in self.engine.take(request_id):
                        outputs.setdefault((request_id, output.choice), []).append(output)
                        open_choices -= output.finish_reason is not None
        finally:
            self._abandon(added)  # does nothing to finished requests
        return [
            _joined(outputs[request_id, choice])
            for request_id, its in zip(added, each, strict=True)
            for choice in range(its.n)
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Text as it becomes final: never half a character, never any part of a stop string.

        Raises `GenerationError` at once for an empty prompt, one that fills the context, or an id
        that the tokenizer does not have. Nothing is computed before the first piece is requested;
        closing the stream cancels the request.
        """
        params = params or self.params()
        if params.n != 1:
            raise GenerationError("a stream has one choice", hint="set n to 1")
        ids = self.ids(prompt)
        self.engine.check(ids, params)
        return self._pieces(ids, params)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking_budget: int | None = None,
    ) -> Completion:
        """The assistant's answer to a conversation; keywords as for `generate`."""
        ids = self.chat_ids(messages, tools, template_kwargs=chat_template_kwargs)
        return self.generate(ids, params, thinking_budget=thinking_budget)

    def embed(
        self, texts: Sequence[Prompt], pooling: Literal["last", "mean"] = "mean"
    ) -> np.ndarray:
        """Hidden states of texts (or ids), pooled and of length 1: float32 (texts, D).

        Raises `GenerationError` for a text that fills the context or has no token.
        """
        if pooling not in ("last", "mean"):
            raise GenerationError(f"pooling '{pooling}' is unknown", hint="last or mean")
        pooled = self.pooled_states(texts, pooling)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True).clip(1e-12)

    def pooled_states(
        self, texts: Sequence[Prompt], pooling: Literal["last", "mean"]
    ) -> np.ndarray:
        """As `embed`, of any length."""
        chunks = [self._chunk(self.ids(text)) for text in texts]
        pooled = np.empty((len(chunks), self.engine.runner.config.hidden_size), np.float32)
        for first, some in self._passes(chunks):
            for row, states in enumerate(self.engine.runner.hidden(some), first):  # (T, D)
                state = states[-1] if pooling == "last" else states.mean(0)
                pooled[row] = state.cpu().numpy()
        return pooled

    def next_logits(self, prompts: Sequence[Prompt], ids: Sequence[int]) -> np.ndarray:
        """Logits of these ids as the next token of every prompt: float32 (prompts, ids).

        Raises `GenerationError` for a prompt that fills the context or has no token.
        """
        chunks = [self._chunk(self.ids(prompt), want=1) for prompt in prompts]
        logits = np.empty((len(chunks), len(ids)), np.float32)
        for first, some in self._passes(chunks):
            for row, last in enumerate(self.engine.runner.run(some), first):  # (1, V)
                logits[row] = last[0, list(ids)].cpu().numpy()
        return logits

    def _chunk(self, ids: list[int], want: int = 0) -> Chunk:
        if not 0 < len(ids) <= self.context:
            raise GenerationError(f"a text has {len(ids)} tokens, not 1 to {self.context}")
        return Chunk(ids, self.engine.runner.new_cache(), want)

    def _passes(self, chunks: list[Chunk]) -> Iterator[tuple[int, list[Chunk]]]:
        """Groups of chunks that fit one step of the engine, each with the index of its first."""
        first = 0
        while first < len(chunks):
            last, room = first, self.engine.step_tokens
            while last < len(chunks) and (last == first or len(chunks[last].ids) <= room):
                room -= len(chunks[last].ids)
                last += 1
            yield first, chunks[first:last]
            for chunk in chunks[first:last]:  # frees their keys and values
                chunk.cache = self.engine.runner.new_cache()
            first = last

    def _add(self, prompt: Prompt, params: SamplingParams) -> int:
        if self._live and not self.engine.unfinished:
            self.engine.weights_changed()  # a live module may have changed since
        return self.engine.add(self.ids(prompt), params, adapter=self.adapter)

    def _pieces(self, ids: list[int], params: SamplingParams) -> Iterator[Piece]:
        request_id = self._add(ids, params)
        try:
            while True:
                self.engine.step()
                for output in self.engine.take(request_id):
                    if output.error is not None:
                        raise output.error
                    yield Piece(output.text, output.generated, output.finish_reason)
                    if output.finish_reason is not None:
                        return
        finally:
            self._abandon([request_id])

    def _abandon(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self.engine.cancel(request_id)
            self.engine.take(request_id)


def plan_inference(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    context: int | None = None,
    sequences: int = 1,
) -> InferencePlan:
    """What generating with a model takes; raises `ConfigError` for a context beyond the model's."""
    own = source.config.max_position_embeddings
    if context is not None and not 0 < context <= own:
        raise ConfigError(
            f"a context of {context:,} tokens is not within 1 to {own:,}, the model's own",
            hint="leave --context out for the longest that fits",
        )
    storage = storage_of(source, device, dtype)
    return InferencePlan(source.config, storage, context or own, storage.dtype, sequences)


def chat_memory(source: ModelSource) -> tuple[Memory, int]:
    """What a chat takes in a process of its own, and its context: 4,096 tokens, or the model's."""
    context = min(4096, source.config.max_position_embeddings)
    base = _PROCESS + _TOKEN * source.config.vocab_size
    return plan_inference(source, context=context).memory(base), context


def fitted(
    plan: InferencePlan,
    base: int,
    limits: Sequence[Limit],
    what: str,
    *,
    explicit: bool,
    device: str | torch.device = "cpu",
) -> InferencePlan:
    """The plan, with a shorter context where it must be and is not `explicit`. Raises
    `NotEnoughMemoryError`."""
    fitting = plan.fitting(base, limits)
    if fitting is None or (explicit and fitting.context < plan.context):
        native = library() is not None if torch.device(device).type == "cpu" else None
        check_memory(
            plan.memory(base),
            limits,
            f"{what} with {plan.context:,} tokens of context",
            plan.smaller(base, limits, native),
            override="--no-memory-check",
        )
    return fitting or plan


def _joined(outputs: Sequence[Output]) -> Completion:
    last = outputs[-1]
    if last.error is not None:
        raise last.error
    assert last.finish_reason is not None
    logprobs = tuple(value for output in outputs for value in output.logprobs)
    text = "".join(output.text for output in outputs)
    ids = tuple(token for output in outputs for token in output.token_ids)
    return Completion(text, last.generated, last.finish_reason, logprobs, ids)


def generate(
    model: str | Path | Generator,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    thinking_budget: int | None = None,
) -> Completion:
    """Continue a text (str) or answer a conversation (a list of messages); keywords as for
    `Generator.generate`.

    `model` is a model directory or .gguf file, loaded for this call, or a `Generator` kept between
    calls. Raises `ModelError`, `GenerationError`.
    """
    generator = model if isinstance(model, Generator) else Generator.from_directory(model)
    return generator.generate(
        prompt,
        params,
        chat_template_kwargs=chat_template_kwargs,
        thinking_budget=thinking_budget,
    )
