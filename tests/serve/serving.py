"""A real server of a tiny random model on a free port, for the tests of the service."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from khaosz.config import ModelConfig
from khaosz.data.tokenizer import train_tokenizer
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator
from khaosz.interop import save_model
from khaosz.model import Transformer
from khaosz.serve.app import build_app
from khaosz.serve.guard import LOOPBACK, Guard
from khaosz.serve.run import listen

CONTEXT = 2048


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of width 32 with random weights that never say that they are done."""
    directory = tmp_path_factory.mktemp("serve") / "tiny"
    tokenizer = train_tokenizer(iter(["the quick brown fox", "春眠不觉晓"] * 20), 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    model = Transformer(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=random)
        # A control token is never the likeliest, so greedy answers run to their limit.
        assert model.lm_head is not None
        for token in tokenizer.special_ids.values():
            model.lm_head.weight[token] = 0.0
    save_model(model, directory)
    tokenizer.save(directory)
    return directory


@dataclass
class Service:
    port: int
    generator: Generator  # its engine belongs to the server's thread

    @property
    def engine(self) -> Engine:
        return self.generator.engine

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        base = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=base, api_key=key, max_retries=0, timeout=30, **more)

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
            given = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, given, json.loads(answer.read())
        finally:
            connection.close()


@contextmanager
def served(
    model: Path,
    *,
    key: str | None = None,
    max_queue: int = 64,
    engine: dict[str, Any] | None = None,
) -> Iterator[Service]:
    generator = Generator.from_directory(model)
    if engine:
        generator.engine = Engine(generator.engine.runner, generator.tokenizer, **engine)
    app = Guard(build_app(generator, "tiny", max_queue=max_queue), key=key, hosts=LOOPBACK)
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="warning")
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        port = bound.getsockname()[1]
        try:
            wait_until(lambda: server.started)
            yield Service(port, generator)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def service(tiny: Path) -> Iterator[Service]:
    with served(tiny) as running:
        yield running


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
