"""Whoever answers: an engine of ours, or a server with an OpenAI-style API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.rag.models.http_client import checked, deltas, read_events

Messages = Sequence[dict[str, str]]


class ChatModel(Protocol):
    context: int  # tokens of prompt and answer together

    def count(self, messages: Messages) -> int:
        """Tokens of a prompt."""

    def stream(self, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        """Pieces of an answer."""


class LocalModel:
    """Drafts from the prompt (`lookup`), since an answer quotes its passages."""

    def __init__(self, model: Path | str | Generator, *, device: str = "cpu") -> None:
        if not isinstance(model, Generator):
            model = Generator.from_directory(model, device=device, lookup=True)
        self._generator = model
        self.context = self._generator.context

    def count(self, messages: Messages) -> int:
        return len(self._generator.chat_ids(messages))

    def stream(self, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        params = SamplingParams(max_tokens, temperature)
        for piece in self._generator.stream(self._generator.chat_ids(messages), params):
            yield piece.text


class HttpModel:
    """`/chat/completions` of any OpenAI-compatible server; a key comes from `KHAOSZ_API_KEY` or
    `OPENAI_API_KEY`.

    Its tokenizer is not known here, so `count` is an estimate, too high for the vocabularies of
    today, not for one that spells Chinese in bytes. Raises `ServerError`.
    """

    _BYTES_PER_TOKEN = 2

    def __init__(self, url: str, model: str, *, context: int = 4096) -> None:
        self._url, self._model, self.context = checked(url), model, context

    def count(self, messages: Messages) -> int:
        size = sum(len(message["content"].encode()) for message in messages)
        return size // self._BYTES_PER_TOKEN + 16 * len(messages)

    def stream(self, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        body = {
            "model": self._model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        for event in read_events(f"{self._url}/chat/completions", body):
            for delta, _ in deltas(event):
                yield delta.get("content") or ""


def open_chat_model(name: str, *, device: str = "cpu") -> ChatModel:
    """`http://host/v1#model`, or a model directory or .gguf file."""
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        return HttpModel(url, model or "default")
    return LocalModel(name, device=device)
