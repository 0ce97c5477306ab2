"""Encoders that were trained for retrieval, from a local folder: BGE, multilingual E5, GTE and
others of the BERT family, as embedders and as cross-encoders.

Folders are as sentence-transformers lays them out: how a text becomes one vector is read from
`1_Pooling/config.json`, what stands before queries and passages from the prompts in
`config_sentence_transformers.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from khaosz.errors import ModelError
from khaosz.interop.encoder import load_encoder
from khaosz.interop.sentence_transformers import load_embedder_settings
from khaosz.rag.models.protocols import unit

_BATCH = 4096  # tokens of one pass, padding counted


class EncoderEmbedder:
    """A text longer than the model reads is cut in windows, whose vectors are averaged by their
    length; nothing of it is left out. Raises `ModelError` for what cannot be computed."""

    good_cosine: float | None = None

    def __init__(self, directory: Path | str, *, device: str = "cpu") -> None:
        folder = Path(directory)
        self._encoder = load_encoder(folder, device=device)
        self._settings = load_embedder_settings(folder)
        self._texts = _Texts(folder, self._encoder.config.longest)
        self._device = device
        self.name = str(folder.resolve())

    @property
    def dimension(self) -> int:
        return self._encoder.config.hidden_size

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedded([self._settings.passage_prefix + text for text in texts])

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedded([self._settings.query_prefix + text for text in texts])

    def tokens(self, texts: Sequence[str]) -> int:
        prefix = self._settings.passage_prefix
        windows = (encoding for text in texts for encoding in self._texts.windows(prefix + text))
        return sum(len(encoding.ids) for encoding in windows)

    def _embedded(self, texts: Sequence[str]) -> np.ndarray:
        owners, encodings = [], []
        for owner, text in enumerate(texts):
            for encoding in self._texts.windows(text):
                owners.append(owner)
                encodings.append(encoding)
        sums = np.zeros((len(texts), self.dimension), np.float32)
        for rows, hidden, lengths in _passes(self._encoder, encodings, self._device):
            pooled = self._pooled(hidden, lengths) * lengths[:, None]  # (B, D)
            np.add.at(sums, [owners[row] for row in rows], pooled.cpu().numpy())
        return unit(sums) if len(texts) else sums

    def _pooled(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        match self._settings.pooling:
            case "cls":
                return hidden[:, 0]
            case "last":
                return hidden[torch.arange(len(hidden)), lengths - 1]
        inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        return (hidden * inside[..., None]).sum(1) / lengths[:, None]


class CrossEncoder:
    """Reads a query and a passage together and says how well they fit: a `Reranker`.

    Of a passage longer than the model reads, the best window counts. Raises `ModelError` for a
    folder that is no sequence classifier of one label, or of two with the second for "fits".
    """

    def __init__(self, directory: Path | str, *, device: str = "cpu") -> None:
        folder = Path(directory)
        self._encoder = load_encoder(folder, device=device, head=True)
        self._texts = _Texts(folder, self._encoder.config.longest)
        self._device = device
        if self._encoder.config.labels > 2:
            raise ModelError(
                f"{folder} has {self._encoder.config.labels} classes: it is no reranker",
                hint="a reranker has one label",
            )

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """float32 (passages,): logits, or the difference of two."""
        owners, encodings = [], []
        for owner, passage in enumerate(passages):
            for encoding in self._texts.pairs(query, passage):
                owners.append(owner)
                encodings.append(encoding)
        best = np.full(len(passages), -np.inf, np.float32)
        for rows, hidden, _ in _passes(self._encoder, encodings, self._device):
            logits = self._encoder.logits(hidden)  # (B, labels)
            score = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            np.maximum.at(best, [owners[row] for row in rows], score.cpu().numpy())
        return best


class _Texts:
    """A folder's tokenizer, and texts cut to what its model reads."""

    def __init__(self, folder: Path, longest: int) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{path} is missing")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other type
            raise ModelError(f"{path} is broken ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._longest = min(longest, load_embedder_settings(folder).max_length or longest)

    def windows(self, text: str) -> Iterator[Any]:
        marks = len(self._tokenizer.encode("").ids)
        for part in self._parts(text, self._longest - marks):
            yield self._fitting(self._tokenizer.encode(part))

    def pairs(self, query: str, passage: str) -> Iterator[Any]:
        encoding = self._tokenizer.encode(query, passage)
        if len(encoding.ids) <= self._longest:
            yield encoding
            return
        # Half of the room at most for the query, so that something is read of the passage.
        marks = len(self._tokenizer.encode("", "").ids)
        query = next(self._parts(query, (self._longest - marks) // 2))
        taken = len(self._tokenizer.encode(query, add_special_tokens=False).ids)
        for part in self._parts(passage, self._longest - marks - taken):
            yield self._fitting(self._tokenizer.encode(query, part))

    def _parts(self, text: str, room: int) -> Iterator[str]:
        """The text in parts of at most `room` tokens, itself if it is short."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= room:
            yield text
            return
        # A part may take a token more than it took inside the text.
        room = max(1, room - 2)
        starts = [0, *(offsets[at][0] for at in range(room, len(offsets), room)), len(text)]
        for start, end in pairwise(starts):
            if start < end:
                yield text[start:end]

    def _fitting(self, encoding: Any) -> Any:
        if len(encoding.ids) > self._longest:  # tokens changed where the text was cut
            encoding.truncate(self._longest)
        return encoding


@torch.no_grad()
def _passes(
    encoder: Any, encodings: Sequence[Any], device: str
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows, their hidden states (B, T, D) and lengths (B,): texts of like length together."""
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
        types.clamp_(max=encoder.config.type_vocab_size - 1)  # RoBERTa has one type
        lengths = torch.tensor([len(encodings[row].ids) for row in rows], device=device)
        yield rows, encoder(ids.to(device), lengths, types.to(device)), lengths
        first = last
