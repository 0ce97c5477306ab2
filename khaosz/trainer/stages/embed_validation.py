"""Held-out retrieval: each held-out query against all passages of the held-out records."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from khaosz.data.records.pairs import TextPairs
from khaosz.model import Transformer, evaluating
from khaosz.trainer.stages.embed import EmbedStrategy
from khaosz.trainer.stages.losses import info_nce, ranks
from khaosz.trainer.strategy import Compute

_COMPARED = 1 << 24  # cosines in memory at a time
RETRIEVAL_PANELS = (
    ("loss", [("loss", "training"), ("val_loss", "held out, more candidates")]),
    ("right passage first", [("accuracy", "training"), ("val_accuracy", "held out")]),
    ("mean reciprocal rank", [("val_mrr", "held out")]),
)


def evaluate_retrieval(
    strategy: EmbedStrategy, model: Transformer, compute: Compute
) -> dict[str, float]:
    """loss, accuracy (the right passage comes first) and mrr (mean of 1 / its rank), each over all
    held-out queries. All held-out passages are candidates of the loss, so it depends on their
    number and differs from the training loss."""
    data, config = strategy.held_out, strategy.config
    with evaluating(model):
        queries = _embedded(strategy, model, data.queries, compute)
        passages = _embedded(strategy, model, data.passages, compute)
    sums = torch.zeros(3, dtype=torch.float64)
    chunk = max(1, _COMPARED // len(passages))
    for first in range(0, len(queries), chunk):
        part = range(first, min(first + chunk, len(queries)))
        positive, answers = _targets(data, part)
        some, targets = queries[part.start : part.stop], positive.to(passages.device)
        masked = answers.to(passages.device)
        loss = info_nce(some, passages, targets, masked, config.temperature)
        places = ranks(some, passages, targets, masked).cpu().double()
        sums += torch.stack([loss.cpu().double().sum(), (places == 1).sum(), (1 / places).sum()])
    return dict(zip(("loss", "accuracy", "mrr"), (sums / len(queries)).tolist(), strict=True))


def _targets(data: TextPairs, part: range) -> tuple[Tensor, Tensor]:
    """positive (Q,) and answers (Q, P) of some pairs; see `info_nce`."""
    answers = torch.zeros(len(part), len(data.passages), dtype=torch.bool)
    for row, pair in enumerate(part):
        answers[row, list(data.answers[pair])] = True
    return torch.tensor([data.positive[pair] for pair in part]), answers


def _embedded(
    strategy: EmbedStrategy, model: Transformer, texts: list[Any], compute: Compute
) -> Tensor:
    """(texts, D), each rank embedding its share."""
    parallel = strategy.parallel
    # With fewer texts than ranks some embed the first one, and then zero it.
    mine = list(range(parallel.rank, len(texts), parallel.world))
    numbers = mine or [0]
    passes = strategy.packed([texts[i] for i in numbers], numbers)
    vectors = strategy.vectors(model, passes, len(texts), compute)
    if parallel.world > 1:
        if not mine:
            vectors.zero_()
        dist.all_reduce(vectors)
    return vectors
