"""Encoders that were trained for retrieval, from a local folder or .gguf file: BGE, multilingual
E5, GTE and others of the BERT family, as embedders and as cross-encoders, and EmbeddingGemma.

Pooling, projections and prefixes are read from the model's files (`interop.retrieval`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import normalizers
from torch import Tensor

from khaosz.errors import ModelError
from khaosz.interop.retrieval import (
    dense_layers,
    embedder_settings,
    encoder_parameters,
    encoder_tokenizer,
    load_encoder,
    reranker_settings,
    tokenizer_errors,
)
from khaosz.interop.sentence_transformers import EmbedderSettings
from khaosz.memory.machine import Limit, memory_limits, resident_memory
from khaosz.memory.parts import BASE, Memory, check_memory
from khaosz.model.encoder import Encoder, TransformerEncoder
from khaosz.rag.models.protocols import GoodCosine, flatten, unit

_BATCH = 4096  # tokens of one forward pass, with padding


class EncoderEmbedder:
    """A text longer than the model's context is cut in windows, whose vectors are averaged,
    weighted by length. Raises `ModelError` for a model that is not supported."""

    good_cosine: GoodCosine = None

    def __init__(self, directory: Path | str, *, device: str = "cpu") -> None:
        folder = Path(directory)
        self._settings = embedder_settings(folder)
        check_encoder_memory(folder, memory_limits(device))
        self._encoder = load_encoder(folder, device=device)
        self._dense = dense_layers(folder).to(device)
        self._tokenizer = _WindowTokenizer(folder, self._encoder.longest, self._settings)
        self._device = device
        self._dimension = self._dense(torch.zeros(1, self._encoder.width, device=device)).shape[1]
        self.name = str(folder.resolve())

    @property
    def dimension(self) -> int:
        return self._dimension

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._embed([self._settings.passage_prefix + text for text in texts])

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._embed([self._settings.query_prefix + text for text in texts])

    def tokens(self, texts: Sequence[str]) -> int:
        prefix = self._settings.passage_prefix
        windows = (
            encoding for text in texts for encoding in self._tokenizer.windows(prefix + text)
        )
        return sum(len(encoding.ids) for encoding in windows)

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        owners, encodings = flatten(self._tokenizer.windows(text) for text in texts)
        sums = np.zeros((len(texts), self.dimension), np.float32)
        for rows, hidden, lengths in _forward(self._encoder, encodings, self._device):
            pooled = self._dense(self._pool(hidden, lengths)) * lengths[:, None]  # (B, D)
            np.add.at(sums, [owners[row] for row in rows], pooled.cpu().numpy())
        return unit(sums) if len(texts) else sums

    def _pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        match self._settings.pooling:
            case "cls":
                return hidden[:, 0]
            case "last":
                return hidden[torch.arange(len(hidden)), lengths - 1]
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        return (hidden * mask[..., None]).sum(1) / lengths[:, None]


class CrossEncoder:
    """A `Reranker` that reads a query and a passage together.

    A passage longer than the model's context has the score of its best window. Raises `ModelError`
    for a folder that is not a sequence classifier of one label, or of two labels with the second
    for "relevant".
    """

    def __init__(self, directory: Path | str, *, device: str = "cpu") -> None:
        folder = Path(directory)
        check_encoder_memory(folder, memory_limits(device))
        encoder = load_encoder(folder, device=device, head=True)
        assert isinstance(encoder, Encoder)
        self._encoder, self._device = encoder, device
        self._tokenizer = _WindowTokenizer(folder, encoder.longest, reranker_settings(folder))
        if self._encoder.config.labels > 2:
            raise ModelError(
                f"{folder} has {self._encoder.config.labels} classes: it is not a reranker",
                hint="a reranker has one label",
            )

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """float32 (passages,): the logit, or the difference of the two."""
        owners, encodings = flatten(self._tokenizer.pairs(query, passage) for passage in passages)
        best = np.full(len(passages), -np.inf, np.float32)
        for rows, hidden, _ in _forward(self._encoder, encodings, self._device):
            logits = self._encoder.logits(hidden)  # (B, labels)
            score = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            np.maximum.at(best, [owners[row] for row in rows], score.cpu().numpy())
        return best


def check_encoder_memory(path: Path, limits: Sequence[Limit]) -> None:
    """Raises `NotEnoughMemoryError` for an encoder whose weights, in fp32, do not fit."""
    parts = {BASE: resident_memory(), "weights": 4 * encoder_parameters(path)}
    check_memory(Memory(parts), limits, str(path), override=None)


class _WindowTokenizer:
    """A model's tokenizer; it cuts texts to the context of the model."""

    def __init__(self, path: Path, longest: int, settings: EmbedderSettings) -> None:
        self._path, self._tokenizer = path, encoder_tokenizer(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings.lower_case:
            steps = [normalizers.Lowercase(), self._tokenizer.normalizer]
            self._tokenizer.normalizer = normalizers.Sequence([step for step in steps if step])
        self._longest = min(longest, settings.max_length or longest)

    def _encode(self, text: str, pair: str | None = None, **options: bool) -> Any:
        with tokenizer_errors(self._path):
            return self._tokenizer.encode(text, pair, **options)

    def windows(self, text: str) -> Iterator[Any]:
        marks = len(self._encode("").ids)
        for part in self._parts(text, self._longest - marks):
            yield self._truncate(self._encode(part))

    def pairs(self, query: str, passage: str) -> Iterator[Any]:
        encoding = self._encode(query, passage)
        if len(encoding.ids) <= self._longest:
            yield encoding
            return
        # The query gets half of the context at most, so that a part of the passage is read.
        marks = len(self._encode("", "").ids)
        query = next(self._parts(query, (self._longest - marks) // 2))
        used = len(self._encode(query, add_special_tokens=False).ids)
        for part in self._parts(passage, self._longest - marks - used):
            yield self._truncate(self._encode(query, part))

    def _parts(self, text: str, size: int) -> Iterator[str]:
        """The text in parts of at most `size` tokens."""
        offsets = self._encode(text, add_special_tokens=False).offsets
        if len(offsets) <= size:
            yield text
            return
        # A part may have a token more than it had inside the text.
        size = max(1, size - 2)
        starts = [0, *(offsets[at][0] for at in range(size, len(offsets), size)), len(text)]
        for start, end in pairwise(starts):
            if start < end:
                yield text[start:end]

    def _truncate(self, encoding: Any) -> Any:
        if len(encoding.ids) > self._longest:  # cutting the text changed its tokens
            encoding.truncate(self._longest)
        return encoding


@torch.no_grad()
def _forward(
    encoder: Encoder | TransformerEncoder, encodings: Sequence[Any], device: str
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows, their hidden states (B, T, D) and lengths (B,): texts of similar length together."""
    order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].ids))
    first = 0
    while first < len(order):
        last = first + 1
        while last < len(order):
            if (last + 1 - first) * len(encodings[order[last]].ids) > _BATCH:
                break
            last += 1
        rows = order[first:last]
        width = len(encodings[rows[-1]].ids)
        ids, types = torch.zeros(2, len(rows), width, dtype=torch.long).unbind()
        for i, row in enumerate(rows):
            length = len(encodings[row].ids)
            ids[i, :length] = torch.tensor(encodings[row].ids)
            types[i, :length] = torch.tensor(encodings[row].type_ids)
        lengths = torch.tensor([len(encodings[row].ids) for row in rows], device=device)
        yield rows, encoder(ids.to(device), lengths, types.to(device)), lengths
        first = last
