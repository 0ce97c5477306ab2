"""A real server of a tiny random model on a free port, for the tests of the service."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from fastapi import APIRouter
from tiny_models import SHAPE, tiny_model

from khaosz.config import ModelConfig
from khaosz.data.tokenizer import train_tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator
from khaosz.interop.huggingface import save_model
from khaosz.model import Transformer
from khaosz.serve.app import build_app
from khaosz.serve.catalogue.pulls import Pulls
from khaosz.serve.connections import LimitedServer, limited_protocol
from khaosz.serve.guard import LOOPBACK, Guard
from khaosz.serve.knowledge.library import Library
from khaosz.serve.models import Limits, Models
from khaosz.serve.retrieval_models import RetrievalModels
from khaosz.serve.run import listen, named_models

CONTEXT = 2048


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of width 32 with random weights that never end an answer."""
    directory = tmp_path_factory.mktemp("serve") / "tiny"
    tokenizer = train_tokenizer(iter(["the quick brown fox", "春眠不觉晓"] * 20), 300)
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT}
    model = tiny_model(**shape, head_dim=8, tie_word_embeddings=False)
    with torch.no_grad():
        # A control token is never the likeliest, so greedy answers run to their limit.
        assert model.lm_head is not None
        for token in tokenizer.special_ids.values():
            model.lm_head.weight[token] = 0.0
    save_model(model, directory)
    tokenizer.save(directory)
    return directory


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["北京", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def lesson(*turns: str, tools: bool = False) -> tuple[list[dict[str, Any]], list[Any] | None]:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": r, "content": text} for r, text in zip(roles, turns, strict=False)]
    return messages, [WEATHER] if tools else None


LESSONS = [
    lesson("think", "<think>\n一 + 一\n</think>\n\n二"),
    lesson("plain", "the fox"),
    lesson(
        "weather",
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>',
        tools=True,
    ),
    lesson(
        "both",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        tools=True,
    ),
    lesson(
        "half",
        '<tool_call>\n{"name": "weather", "arguments": {"city": "\\ud83d"}}\n</tool_call>',
        tools=True,
    ),
]


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has memorised `LESSONS`, so that it reasons and calls tools by itself."""
    return learnt(LESSONS, tmp_path_factory.mktemp("serve") / "taught")


def learnt(lessons: Sequence[tuple[list[Any], list[Any] | None]], directory: Path) -> Path:
    """A small model that answers with the assistant's turns of these chats, for every seed."""
    words = [turn["content"] for messages, _ in lessons for turn in messages]
    tokenizer = train_tokenizer(iter([*words, json.dumps(WEATHER)] * 20), 500)
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    shape |= {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    model = Transformer(ModelConfig.parse({**SHAPE, **shape, "tie_word_embeddings": False}))
    chats = [encode_chat(tokenizer, messages, tools) for messages, tools in lessons]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = torch.zeros(())
        for ids, mask in chats:
            logits = model.logits(model(torch.tensor([ids[:-1]])))[0]
            labels = torch.tensor(ids[1:]).where(torch.tensor(mask[1:]).bool(), -100)
            loss = loss + torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.1, float(loss)
    with torch.no_grad():  # so confident that sampling is deterministic
        assert model.lm_head is not None
        model.lm_head.weight *= 5
    save_model(model, directory)
    tokenizer.save(directory)
    return directory


@dataclass
class Service:
    port: int
    models: Models
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def generator(self) -> Generator:
        """The first model's; its engine belongs to the server's thread."""
        loaded = self.models.all[0].loaded
        assert loaded is not None
        return loaded.generator

    @property
    def engine(self) -> Engine:
        return self.generator.engine

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        base = f"http://127.0.0.1:{self.port}/v1"
        client = openai.OpenAI(base_url=base, api_key=key, max_retries=0, timeout=30, **more)
        self.clients.append(client)  # closed with the service
        return client

    def text(self, path: str) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def raw(self, method: str, path: str, body: str) -> str:
        """The body of a successful response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            return text
        finally:
            connection.close()

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers (lower case) and JSON of a plain request."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            if body is not None:
                headers.setdefault("Content-Type", "application/json")
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            received = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, received, json.loads(answer.read())
        finally:
            connection.close()


@contextmanager
def served(
    *models: Path | str,
    loras: Sequence[str] = (),
    key: str | None = None,
    origins: Sequence[str] = (),
    limits: Limits | None = None,
    deterministic: bool = False,
    timeout: float = 60.0,
    heartbeat: float = 5.0,
    http: Any = None,
    drain: int | None = None,
    step_tokens: int | None = None,
    retrieval: RetrievalModels | None = None,
    library: Library | None = None,
    runs: Path | None = None,
    routers: Sequence[APIRouter] = (),
) -> Iterator[Service]:
    """`models` and `loras` as the command's arguments; `runs`: serve the catalogue, too."""
    described = named_models([str(each) for each in models], loras)
    all_models = Models(described, limits or Limits(64), deterministic=deterministic)
    all_models.preload()
    if step_tokens is not None:
        service = Service(0, all_models)
        service.engine.step_tokens = step_tokens
    inner = build_app(
        all_models,
        retrieval=retrieval,
        library=library,
        pulls=None if runs is None else Pulls(all_models),
        runs=runs or Path(),
        timeout=timeout,
        heartbeat=heartbeat,
        routers=routers,
    )
    app = Guard(inner, key=key, hosts=LOOPBACK, origins=origins)
    config = uvicorn.Config(
        app,
        http=http or limited_protocol(),
        ws="none",
        lifespan="on",
        log_level="warning",
        timeout_graceful_shutdown=drain,
    )
    server = LimitedServer(config, all_models.interrupt)
    with listen("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        port = bound.getsockname()[1]
        try:
            wait_until(lambda: server.started)
            service = Service(port, all_models)
            yield service
            for client in service.clients:
                client.close()
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def open_requests(service: Service) -> int:
    loaded = service.models.all[0].loaded
    assert loaded is not None
    return loaded.worker.open_requests


@pytest.fixture(scope="session")
def service(tiny: Path) -> Iterator[Service]:
    with served(tiny) as running:
        yield running


def slowed(service: Service, name: str) -> None:
    """Slow the model down, so that an answer can be stopped or observed before its end."""
    service.client().completions.create(model=name, prompt="x", max_tokens=1)
    loaded = service.models.find(name).loaded
    assert loaded is not None
    runner = loaded.generator.engine.runner
    run = runner.run

    def slow(chunks: Any) -> Any:
        time.sleep(0.01)
        return run(chunks)

    runner.run = slow  # type: ignore[method-assign]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
