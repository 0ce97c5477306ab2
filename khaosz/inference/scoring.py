"""Log-probabilities of given text: bits per byte and validation loss.

Shapes: B rows, T positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from khaosz.inference.linear.head import stored_nats
from khaosz.model import Transformer, evaluating

_CHUNK = 1024  # tokens whose logits exist at one time


@dataclass(frozen=True)
class Score:
    """Sums over scored positions; `text_*` leave out special tokens, which stand for no bytes."""

    nats: float = 0.0
    tokens: int = 0
    text_nats: float = 0.0
    text_bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_nats + other.text_nats,
            self.text_bytes + other.text_bytes,
        )

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per scored token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


@dataclass(frozen=True)
class Document:
    """One document's token ids (begin token first) and, where not all count, its loss mask."""

    ids: NDArray[np.integer]
    loss_mask: NDArray[np.integer] | None = None


def score_documents(
    model: Transformer,
    documents: Iterable[Document],
    *,
    window: int,
    byte_lengths: NDArray[np.int64],
    dtype: torch.dtype = torch.float32,
    rows: int = 16,
) -> Score:
    """Score documents, each alone, in consecutive non-overlapping windows of `window` inputs.

    Every token after the first is scored exactly once (those of the loss mask, if given);
    the first input of a later window is the last target of the one before. The model is left in
    the mode it was in.
    """
    device = next(model.parameters()).device
    lengths = torch.from_numpy(byte_lengths).to(device)
    total = Score()
    with evaluating(model):
        for ids, labels in _batches(documents, window, rows):
            total += _score_batch(model, ids.to(device), labels.to(device), lengths, dtype)
    return total


def _batches(
    documents: Iterable[Document], window: int, rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) batches (B, T) of document segments, labels -100 where not scored."""
    segments: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    # Rows of like length share a batch, so that little of it is padding.
    for document in documents:
        ids = np.asarray(document.ids, dtype=np.int64)
        labels = ids[1:]
        if document.loss_mask is not None:
            labels = np.where(np.asarray(document.loss_mask)[1:] != 0, labels, -100)
        for start in range(0, len(labels), window):
            segments.append((ids[:-1][start : start + window], labels[start : start + window]))
        if len(segments) >= 16 * rows:
            yield from _padded(segments, rows)
            segments = []
    yield from _padded(segments, rows)


def _padded(
    segments: list[tuple[NDArray[np.int64], NDArray[np.int64]]], rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    segments = sorted(segments, key=lambda segment: len(segment[0]))
    for start in range(0, len(segments), rows):
        part = segments[start : start + rows]
        longest = max(len(ids) for ids, _ in part)
        ids = np.zeros((len(part), longest), dtype=np.int64)  # causal: padding behind is unseen
        labels = np.full((len(part), longest), -100, dtype=np.int64)
        for row, (some_ids, some_labels) in enumerate(part):
            ids[row, : len(some_ids)] = some_ids
            labels[row, : len(some_labels)] = some_labels
        yield torch.from_numpy(ids), torch.from_numpy(labels)


@torch.no_grad()
def _score_batch(
    model: Transformer, ids: Tensor, labels: Tensor, byte_lengths: Tensor, dtype: torch.dtype
) -> Score:
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = model(ids)  # (B, T, D)
    scored = labels != -100
    flat, targets = hidden[scored], labels[scored]
    nats = torch.cat(
        [
            token_nats(model, flat[i : i + _CHUNK], targets[i : i + _CHUNK])
            for i in range(0, len(targets), _CHUNK)
        ]
        or [torch.zeros(0, device=ids.device)]
    ).double()
    sizes = byte_lengths[targets]
    return Score(float(nats.sum()), len(targets), float(nats[sizes > 0].sum()), int(sizes.sum()))


def token_nats(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log P(target) (N,) of hidden states (N, D), in fp32."""
    if (stored := model.stored_head) is not None:
        cap = model.config.final_logit_softcapping
        return stored_nats(model.head_input(hidden), stored, targets, cap)[0]
    logits = model.logits(hidden).float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None]).squeeze(1)
