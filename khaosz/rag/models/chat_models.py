"""Models that write answers: an engine in this process, or a server with an OpenAI-style API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from khaosz.errors import ServerError
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.rag.models.http_client import check_url, deltas, read_events, split_address
from khaosz.rag.models.protocols import ChatModel, Messages

SERVER_SEEDS = (1 << 31) - 1  # servers read seeds of 32 bits
_MAX_ANSWER = 1 << 20  # characters


class LocalModel:
    """Drafts tokens from the prompt (`prompt_lookup`), since an answer quotes its passages."""

    def __init__(self, model: Path | str | Generator, *, device: str = "cpu") -> None:
        if not isinstance(model, Generator):
            model = Generator.from_directory(model, device=device, prompt_lookup=True)
        self._generator = model
        self.context = self._generator.context

    def count(self, messages: Messages) -> int:
        return len(self._generator.chat_ids(messages))

    def stream(self, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        params = SamplingParams(max_tokens, temperature)
        for piece in self._generator.stream(self._generator.chat_ids(messages), params):
            yield piece.text


class HttpModel:
    """`/chat/completions` of an OpenAI-compatible server. The API key is read from
    `KHAOSZ_API_KEY` or `OPENAI_API_KEY`.

    The server's tokenizer is unknown, so `count` is an estimate: too high for today's
    vocabularies, too low for one that encodes Chinese as bytes. Raises `ServerError`.
    """

    _BYTES_PER_TOKEN = 2

    def __init__(self, url: str, model: str, *, context: int = 4096) -> None:
        self._url, self._model, self.context = check_url(url), model, context

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


def sampled_answer(
    url: str,
    model: str,
    messages: Messages,
    sampling: Mapping[str, Any],
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[str, str]:
    """Text and finish reason, "stop" or "length", of one answer of an OpenAI-compatible server.
    `sampling`: fields of the request. Raises `ServerError`, also when `stopped` between pieces."""
    text, reason = "", "stop"
    body = {"model": model, "messages": list(messages), **sampling, "stream": True}
    for event in read_events(f"{url}/chat/completions", body):
        for delta, finish in deltas(event):
            text += delta.get("content") or ""
            reason = finish or reason
        if stopped() or len(text) > _MAX_ANSWER:
            raise ServerError(f"{url}: the answer was stopped at {len(text)} characters")
    return text, "length" if reason == "length" else "stop"


def open_chat_model(name: str, *, device: str = "cpu") -> ChatModel:
    """`http://host/v1#model`, or a model directory or .gguf file."""
    if address := split_address(name):
        return HttpModel(*address)
    return LocalModel(name, device=device)
