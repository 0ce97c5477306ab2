"""A plain generator with a KV cache: whole or streaming, text or chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from khaosz.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from khaosz.errors import GenerationError
from khaosz.inference.sampling import SamplingParams, sample
from khaosz.interop import load_model
from khaosz.model import KVCache, Transformer


@dataclass(frozen=True)
class Piece:
    """What a stream hands out: text that is final, and at the end why it ended."""

    text: str
    tokens: int  # generated so far
    finish_reason: str | None = None  # "stop" | "length" with the last piece


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int  # generated, the one that ends the turn included
    finish_reason: str  # "stop": an end token or a stop string; "length": a limit was reached


class Generator:
    """Generates with one model and its tokenizer. Not safe to share between threads."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise GenerationError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only"
                f" {model.config.vocab_size}",
                hint="use the tokenizer the model was trained with",
            )
        self.model, self.tokenizer = model, tokenizer
        self.end_ids = {tokenizer.eos_id, tokenizer.end_id}

    @classmethod
    def from_directory(
        cls, directory: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Generator:
        return cls(load_model(directory, device=device, dtype=dtype), load_tokenizer(directory))

    @property
    def context(self) -> int:
        """Positions a prompt and its answer may fill together."""
        return self.model.config.max_position_embeddings

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text to continue: begin token first, as documents are trained."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def chat_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of a conversation, up to and with the mark that lets the assistant speak."""
        return self.tokenizer.encode_chat(list(messages), add_generation_prompt=True)[0]

    def generate(self, ids: Sequence[int], params: SamplingParams | None = None) -> Completion:
        """The whole answer to prompt ids; the same text `stream` hands out piece by piece."""
        text, last = [], None
        for last in self.stream(ids, params):
            text.append(last.text)
        assert last is not None and last.finish_reason is not None
        return Completion("".join(text), last.tokens, last.finish_reason)

    def stream(self, ids: Sequence[int], params: SamplingParams | None = None) -> Iterator[Piece]:
        """Text as it becomes final: never half a character, never any part of a stop string.

        Raises `GenerationError` at once for an empty prompt, one that fills the context, or an id
        that the tokenizer does not have.
        """
        params = params or SamplingParams()
        if not len(ids):
            raise GenerationError("the prompt is empty")
        if len(ids) >= self.context:
            raise GenerationError(
                f"the prompt has {len(ids)} tokens, the model's context is {self.context}",
                hint="shorten the prompt; it is never cut silently",
            )
        if not all(0 <= token < self.tokenizer.vocab_size for token in ids):
            last = self.tokenizer.vocab_size - 1
            raise GenerationError(f"the prompt has token ids outside 0 to {last}")
        return self._pieces(list(ids), params)

    def _pieces(self, ids: list[int], params: SamplingParams) -> Iterator[Piece]:
        decoder = StreamDecoder(self.tokenizer)
        held = ""  # text that might still turn out to begin a stop string
        count, reason = 0, "length"
        for token in self._tokens(ids, params):
            count += 1
            if token in self.end_ids:
                reason = "stop"
                break
            held += decoder.push(token)
            stop = _first_stop(held, params.stop)
            if stop is not None:
                yield Piece(held[:stop], count, "stop")
                return
            keep = _possible_stop(held, params.stop)
            ready, held = held[: len(held) - keep], held[len(held) - keep :]
            if ready:
                yield Piece(ready, count)
        held += decoder.finish()
        stop = _first_stop(held, params.stop)
        if stop is not None:
            held, reason = held[:stop], "stop"
        yield Piece(held, count, reason)

    @torch.inference_mode()
    def _tokens(self, ids: list[int], params: SamplingParams) -> Iterator[int]:
        """Token ids one by one, until a limit; the caller decides what ends a turn."""
        device = self.model.embed_tokens.weight.device
        random = torch.Generator(device=device)
        if params.seed is not None:
            random.manual_seed(params.seed)
        else:
            random.seed()
        cache = KVCache(self.model.config.num_hidden_layers)
        seen = torch.tensor(ids, device=device)
        new = seen[None]  # (1, T)
        for _ in range(min(params.max_tokens, self.context - len(ids))):
            hidden = self.model(new, cache=cache)[0, -1]
            # A vocabulary padded beyond the tokenizer's has rows that stand for nothing.
            logits = self.model.logits(hidden)[: self.tokenizer.vocab_size]
            token = sample(logits, params, seen, random)
            yield token
            new = torch.tensor([[token]], device=device)
            if params.repetition_penalty != 1.0:
                seen = torch.cat((seen, new[0]))


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins, or None."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found, default=None)


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of some stop string."""
    for length in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def generate(
    model: str | Path | Generator,
    prompt: str | Sequence[dict[str, Any]],
    params: SamplingParams | None = None,
) -> Completion:
    """Continue a text (str) or answer a conversation (a list of messages).

    `model` is a model directory, loaded for this call, or a `Generator` kept between calls.
    Raises `ModelError`, `GenerationError`.
    """
    generator = model if isinstance(model, Generator) else Generator.from_directory(model)
    ids = generator.prompt_ids(prompt) if isinstance(prompt, str) else generator.chat_ids(prompt)
    return generator.generate(ids, params)
