"""Bits per byte against a float64 reference that scores every document in full."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import tiny_model

from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.inference.scoring import Document, Score, _batches, score_documents, token_nats
from khaosz.model import Transformer

torch.set_num_threads(1)

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "a",
    "🙂 mixed 中文 and English, once more: 处处闻啼鸟 the lazy dog" * 3,
]
# fp32 hidden states err by 1e-6 or so on logits of size 1 to 10; averaged over tokens, less.
FP32 = 1e-5


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXTS * 5), 300)


@cache
def model() -> Transformer:
    padded = tokenizer().vocab_size + 20  # as real vocabularies are
    return tiny_model(vocab_size=padded, max_position_embeddings=512, qk_norm=True)


def ids_of(text: str, end: bool = False) -> NDArray[np.int64]:
    tail = [tokenizer().eos_id] if end else []
    return np.array([tokenizer().bos_id, *tokenizer().encode(text), *tail], dtype=np.int64)


def score(documents: list[Document], **options: Any) -> Score:
    options = {"window": 512, "byte_lengths": tokenizer().byte_lengths, **options}
    return score_documents(model(), documents, **options)


def reference_nats(ids: NDArray[np.int64], window: int = 10_000) -> list[float]:
    """-log P of every token after the first, from full logits (T, V) in float64."""
    nats = []
    for start in range(0, len(ids) - 1, window):
        inputs, targets = ids[:-1][start : start + window], ids[1:][start : start + window]
        with torch.no_grad():
            hidden = model()(torch.from_numpy(inputs)[None])[0].double()
        logits = (hidden @ model().output_weight.double().T).detach().numpy()
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats += [-float(log_p[t, target]) for t, target in enumerate(targets)]
    return nats


def test_bits_per_byte_match_reference() -> None:
    result = score([Document(ids_of(text)) for text in TEXTS])
    nats = sum(sum(reference_nats(ids_of(text))) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert result.text_bytes == size
    assert result.tokens == sum(len(ids_of(text)) - 1 for text in TEXTS)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=FP32)
    assert result.loss == pytest.approx(nats / result.tokens, rel=FP32)


def test_end_token_counts_as_token_without_text() -> None:
    ids = ids_of(TEXTS[0], end=True)
    result, nats = score([Document(ids)]), reference_nats(ids)
    assert result.nats == pytest.approx(sum(nats), rel=FP32)
    assert result.text_nats == pytest.approx(sum(nats[:-1]), rel=FP32)
    assert result.text_bytes == len(TEXTS[0].encode())


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_windows_score_each_token_once(window: int) -> None:
    documents = [Document(ids_of(text)) for text in TEXTS]
    scored: Counter[tuple[int, int]] = Counter()
    for ids, labels in _batches(documents, window, rows=3):
        assert ids.shape == labels.shape and ids.shape[1] <= window and ids.shape[0] <= 3
        for some_ids, some_labels in zip(ids.tolist(), labels.tolist(), strict=True):
            scored.update(
                (i, label) for i, label in zip(some_ids, some_labels, strict=True) if label != -100
            )
    pairs: Counter[tuple[int, int]] = Counter()
    for document in documents:
        pairs.update(zip(document.ids[:-1].tolist(), document.ids[1:].tolist(), strict=True))
    assert scored == pairs
    result = score(documents, window=window)
    nats = sum(sum(reference_nats(ids_of(text), window)) for text in TEXTS)
    assert result.nats == pytest.approx(nats, rel=FP32)
    assert result.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_only_masked_in_tokens_are_scored() -> None:
    ids = ids_of(TEXTS[1], end=True)
    mask = np.arange(len(ids)) % 3 == 0  # the first token is marked and yet never a target
    result = score([Document(ids, mask.astype(np.uint8))], window=16)
    nats = reference_nats(ids, 16)
    saved = [nat for nat, marked in zip(nats, mask[1:], strict=True) if marked]
    assert result.tokens == len(saved)
    assert result.nats == pytest.approx(sum(saved), rel=FP32)
    sizes = tokenizer().byte_lengths[ids[1:][mask[1:]]]
    assert result.text_bytes == int(sizes.sum())


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_batching_and_padding_do_not_change_scores(rows: int) -> None:
    documents = [Document(ids_of(text)) for text in TEXTS * 3]
    alone = sum((score([document], rows=1) for document in documents), Score())
    together = score(documents, rows=rows)
    assert (together.tokens, together.text_bytes) == (alone.tokens, alone.text_bytes)
    # Other matrix shapes sum in another order: fp32 rounding.
    assert together.nats == pytest.approx(alone.nats, rel=1e-6)
    assert together.text_nats == pytest.approx(alone.text_nats, rel=1e-6)


def test_more_segments_than_one_buffer() -> None:
    documents = [Document(ids_of("a quick dog"))] * 50
    one, all_of_them = score(documents[:1]), score(documents, rows=2)  # 16 * 2 are held
    assert all_of_them.tokens == 50 * one.tokens
    assert all_of_them.nats == pytest.approx(50 * one.nats, rel=1e-6)  # as above


def test_more_tokens_than_one_chunk_of_logits() -> None:
    documents = [Document(ids_of(TEXTS[3]))] * 16
    one, many = score(documents[:1]), score(documents)
    assert many.tokens > 1024
    assert many.nats == pytest.approx(16 * one.nats, rel=1e-6)  # as above


@pytest.mark.parametrize("ids", [[], [1]])
def test_document_without_scored_tokens(ids: list[int]) -> None:
    empty = Document(np.array(ids, dtype=np.int64))
    assert score([empty]) == Score()
    both = score([empty, Document(ids_of("a"))])
    assert both.tokens == 1
    masked = Document(ids_of("abc"), np.zeros(len(ids_of("abc")), dtype=np.uint8))
    assert score([masked]) == Score()


def test_loss_of_nothing_is_nan() -> None:
    assert math.isnan(Score().loss) and math.isnan(Score().bits_per_byte)
    assert score([]) == Score()


@pytest.mark.parametrize("training", [True, False])
def test_model_mode_is_restored(training: bool) -> None:
    model().train(training)
    score([Document(ids_of("a"))])
    assert model().training == training
    assert all(parameter.grad is None for parameter in model().parameters())


def test_bf16_compute_is_close() -> None:
    documents = [Document(ids_of(text)) for text in TEXTS]
    exact, narrow = score(documents), score(documents, dtype=torch.bfloat16)
    assert narrow.tokens == exact.tokens
    # bf16 keeps 8 bits: 0.4% of each value, of either sign, averaged over 100 tokens and more.
    assert narrow.loss == pytest.approx(exact.loss, rel=0.01)
    assert narrow.loss != exact.loss


def test_token_nats_by_hand() -> None:
    with torch.no_grad():
        hidden = torch.zeros(2, 32)
        nats = token_nats(model(), hidden, torch.tensor([0, 5]))
    uniform = math.log(model().config.vocab_size)
    assert nats.tolist() == pytest.approx([uniform, uniform], rel=1e-6)


def test_scores_are_additive() -> None:
    total = Score(1.0, 2, 0.5, 3) + Score(2.0, 4, 1.5, 5)
    assert total == Score(3.0, 6, 2.0, 8)
    assert (total.loss, total.bits_per_byte) == (0.5, 2.0 / math.log(2) / 8)
