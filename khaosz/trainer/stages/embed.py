"""The embedder's stage: the vector of a query is near its passages and far from all others.

The loss couples all texts of a step, which may not fit one forward pass. So a step embeds them
twice (GradCache, Gao et al. 2021, arXiv:2101.06983): first pass by pass without a graph, for the
loss and its gradient by each vector; then pass by pass with a graph, through which these gradients
reach the weights. The sum is the gradient of the plain computation, in the memory of one pass.

Shapes: S sequences of a pass, N texts of a step, Q of them queries, P passages, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from khaosz.config import EmbedConfig
from khaosz.data.batches.sampler import draws_for, example_of
from khaosz.data.batches.sequences import SequenceBatch, TokenSequence, fit_rows, pack_sequences
from khaosz.data.records.pairs import TextPairs
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.stages.losses import info_nce, ranks
from khaosz.trainer.strategy import BatchLayout, Compute, Strategy, hidden_states

_FITTED = 1024  # texts that are fitted into rows together: fitting takes quadratic time


def embed(
    model: Transformer, batch: SequenceBatch, compute: Compute, pooling: Literal["mean", "last"]
) -> Tensor:
    """Vectors (S, D) of length 1, fp32 or wider."""
    hidden = hidden_states(model, batch, compute)
    flat = hidden.reshape(-1, hidden.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if pooling == "last":
        return F.normalize(flat[batch.ends], dim=-1)
    owners = batch.doc_ids.flatten()
    real = owners >= 0
    sums = flat.new_zeros(batch.sequences, flat.shape[1]).index_add(0, owners[real], flat[real])
    return F.normalize(sums, dim=-1)  # a sum has the direction of the mean


@dataclass(eq=False)
class Step:
    """All texts of one optimizer step on all ranks, queries first, and the loss over their vectors.

    passes     this rank's texts, packed; `fields["text"]` (S,) are their indices in the step
    positive   (Q,) int64, answers (Q, P) bool: see `info_nce`
    gradient   (N, D): of the loss sum, by each vector
    losses     (Q,), right (Q,): the loss, and whether the query's own passage is the nearest
    """

    passes: list[SequenceBatch]
    texts: int
    positive: Tensor
    answers: Tensor
    gradient: Tensor = field(init=False)
    losses: Tensor = field(init=False)
    right: Tensor = field(init=False)


@dataclass(eq=False)
class Pass:
    """A micro-batch: one of a step's passes."""

    step: Step
    number: int
    packed: SequenceBatch

    @property
    def tokens(self) -> int:
        return self.packed.tokens

    def to(self, device: torch.device | str) -> Pass:
        return Pass(self.step, self.number, self.packed.to(device))


@dataclass
class EmbedStrategy(Strategy):
    """InfoNCE over all queries and all distinct passages of a step on all ranks, hard negatives
    included. The loss is summed over queries and counted in queries."""

    data: TextPairs
    held_out: TextPairs
    layout: BatchLayout  # of pairs, and of the rows of a pass
    parallel: ParallelContext
    config: EmbedConfig

    def __post_init__(self) -> None:
        self.progress_metrics = ("accuracy", "mrr")

    @property
    def examples(self) -> int:
        return len(self.data)

    def micro_batches(self, step: int) -> list[Pass]:
        """The same texts in the same order on all ranks; each rank packs its own."""
        parallel, layout, total = self.parallel, self.layout, len(self.data)
        drawn = {
            draw: rank
            for rank in range(parallel.world)
            for draw in draws_for(step, layout.per_step, rank, parallel.world)
        }
        chosen, owner = [], []
        for draw in sorted(drawn):
            chosen.append(example_of(draw, total, layout.seed))
            owner.append(drawn[draw])
        passages: dict[int, int] = {}  # a passage of the data -> the rank that embeds it, in order
        for pair, rank in zip(chosen, owner, strict=True):
            for number in (self.data.positive[pair], *self.data.negatives[pair]):
                passages.setdefault(number, rank)
        place = {number: i for i, number in enumerate(passages)}
        answers = torch.zeros(len(chosen), len(place), dtype=torch.bool)
        for row, pair in enumerate(chosen):
            relevant = self.data.answers[pair]
            answers[row, [place[number] for number in relevant if number in place]] = True
        texts = [self.data.queries[pair] for pair in chosen]
        texts += [self.data.passages[number] for number in passages]
        owned = [*owner, *passages.values()]
        mine = [i for i, rank in enumerate(owned) if rank == parallel.rank]
        positive = torch.tensor([place[self.data.positive[pair]] for pair in chosen])
        packed = list(self.packed([texts[i] for i in mine], mine))
        whole = Step(packed, len(texts), positive, answers)
        return [Pass(whole, number, batch) for number, batch in enumerate(packed)]

    def packed(self, texts: Sequence[Any], numbers: Sequence[int]) -> Iterator[SequenceBatch]:
        """Passes over texts, each in rows of `window` tokens; `numbers` become their fields."""
        layout = self.layout
        rows = layout.micro_rows if layout.one_shape else None
        for start in range(0, len(texts), _FITTED):
            lengths = [len(text) for text in texts[start : start + _FITTED]]
            placed = fit_rows(lengths, layout.window)
            for first in range(0, len(placed), layout.micro_rows):
                chosen = placed[first : first + layout.micro_rows]
                members = sorted(start + i for row in chosen for i in row)
                sequences = [TokenSequence(texts[i].tolist(), 0) for i in members]
                batch = pack_sequences(sequences, layout.window, layout.pad_id, rows=rows)
                yield batch.with_fields(text=torch.tensor([numbers[i] for i in members]))

    def count(self, batch: Pass) -> int:
        return int((batch.packed.fields["text"] < len(batch.step.positive)).sum())

    def loss(self, model: Transformer, batch: Pass, compute: Compute) -> Tensor:
        """The losses of the pass's queries, with this pass's part of the step's gradient. The first
        pass of a step embeds all texts without a graph."""
        step = batch.step
        if batch.number == 0:
            self._compare(model, step, compute)
        texts = batch.packed.fields["text"]
        vectors = embed(model, batch.packed, compute, self.config.pooling)
        through = (vectors * step.gradient[texts]).sum()
        queries = texts[texts < len(step.positive)]
        self.add_metrics(accuracy=step.right[queries].sum())
        return step.losses[queries].sum() + (through - through.detach())

    def _compare(self, model: Transformer, step: Step, compute: Compute) -> None:
        device = self.parallel.device
        vectors = self.vectors(model, step.passes, step.texts, compute)
        if self.parallel.world > 1:
            dist.all_reduce(vectors)  # each rank has filled rows that are zero on the others
        positive, answers = step.positive.to(device), step.answers.to(device)
        leaf = vectors.requires_grad_()
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            queries, passages = leaf[: len(positive)], leaf[len(positive) :]
            losses = info_nce(
                queries,
                passages,
                positive,
                answers,
                self.config.temperature,
                symmetric=self.config.symmetric,
            )
            (step.gradient,) = torch.autograd.grad(losses.sum(), leaf)
        step.losses = losses.detach()
        places = ranks(queries.detach(), passages.detach(), positive, answers)
        step.right = (places == 1).to(losses.dtype)

    @torch.no_grad()
    def vectors(
        self, model: Transformer, passes: Iterable[SequenceBatch], texts: int, compute: Compute
    ) -> Tensor:
        """Vectors (texts, D) of the texts in the passes, zeros for other texts."""
        device = self.parallel.device
        vectors: Tensor | None = None
        for packed in passes:
            batch = packed.to(device)
            embedded = embed(model, batch, compute, self.config.pooling)
            if vectors is None:
                vectors = embedded.new_zeros(texts, embedded.shape[1])
            vectors[batch.fields["text"]] = embedded
        assert vectors is not None, "a rank without texts"
        return vectors
