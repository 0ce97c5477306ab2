"""Bits per byte of a model on a file of texts: comparable across tokenizers.

Each document is scored alone: begin token first, non-overlapping windows of the training length,
no end token. bits = -sum log2 P(token), bytes = UTF-8 bytes of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from khaosz.config import ColumnsConfig
from khaosz.data.records.report import InputReport, refuse_unread, summary
from khaosz.data.records.texts import read_texts
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import DataError
from khaosz.inference.scoring import Document, Score, score_documents
from khaosz.interop.models import load_model, open_tokenizer
from khaosz.trainer.checkpoint import stored_window

_BATCH = 256  # documents tokenised together


@dataclass(frozen=True)
class BitsPerByte:
    """The result for a file; `by_lang` has the bits per byte of each language in it. `records` were
    read, of which `unread` could not be; `report` has the reasons as lines."""

    bits_per_byte: float
    bytes: int
    tokens: int
    by_lang: dict[str, float]
    records: int
    unread: int
    report: tuple[str, ...]


def bits_per_byte(
    model_dir: Path,
    file: Path,
    *,
    window: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    limit: int | None = None,
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> BitsPerByte:
    """Score `file` (jsonl, jsonl.zst, txt, ...) with the model in `model_dir`.

    `window` defaults to the training length, else the whole context. `limit` is a number of
    documents. Raises `ModelError`, `DataError`; the latter also when more than 1 % of the records
    cannot be read, unless they are allowed.
    """
    model = load_model(model_dir, device=device, dtype=dtype)
    tokenizer = open_tokenizer(model_dir)
    window = window or stored_window(model_dir) or model.config.max_position_embeddings
    report = InputReport(str(file))
    for _ in islice(read_texts(file, report, columns), limit):
        pass  # reading is fast, scoring is not: refuse the file before
    refuse_unread([report], allow_unread)
    by_lang: dict[str, Score] = {}
    texts = islice(read_texts(file, columns=columns), limit)
    for lang, documents in _by_language(texts, tokenizer):
        score = score_documents(
            model, documents, window=window, byte_lengths=tokenizer.byte_lengths, dtype=dtype
        )
        by_lang[lang] = by_lang.get(lang, Score()) + score
    total = sum(by_lang.values(), Score())
    if not total.text_bytes:
        raise DataError(f"{file}: no text to score")
    return BitsPerByte(
        round(total.bits_per_byte, 5),
        total.text_bytes,
        total.tokens,
        {lang: round(score.bits_per_byte, 5) for lang, score in sorted(by_lang.items())},
        report.records,
        report.unread,
        tuple(summary([report])),
    )


def _by_language(
    texts: Iterator[tuple[str, str]], tokenizer: Tokenizer
) -> Iterator[tuple[str, list[Document]]]:
    """Batches of documents of one language: begin token and text, no end token."""
    batches: dict[str, list[str]] = {}
    for lang, text in texts:
        batch = batches.setdefault(lang, [])
        batch.append(text)
        if len(batch) >= _BATCH:
            yield lang, _documents(batches.pop(lang), tokenizer)
    for lang, batch in batches.items():
        yield lang, _documents(batch, tokenizer)


def _documents(texts: list[str], tokenizer: Tokenizer) -> list[Document]:
    return [
        Document(np.array([tokenizer.bos_id, *ids], dtype=np.int64))
        for ids in tokenizer.encode_batch(texts)
    ]
